"""What the family's CUDA kernels take, and when they step back for cuBLAS."""

import pytest
import torch

from snapkernels import FeedForwardWeights, quantise_feed_forward
from snapkernels.ops.feed_forward import config
from snapkernels.ops.feed_forward.weights import DIMS
from snapkernels.testing.inputs import random_weights

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(config.extension, "refuses", lambda tensor: None)


def empty(*shape, dtype=BF16):
    """Without memory: only its shape counts."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear(tokens, columns, depth, norm=None, dtype=BF16):
    bias = empty(columns)
    return config.cuda_refuses_linear(
        tokens, empty(columns, depth, dtype=dtype), bias, norm, norm, None, 1e-6
    )


def linear_fp8(tokens, columns, depth):
    weight, scale = empty(columns, depth, dtype=E4M3), empty(columns, dtype=torch.float32)
    return config.cuda_refuses_linear_fp8(
        tokens, weight, scale, empty(columns), None, None, None, 1e-6
    )


def test_widths_that_kernels_take():
    assert linear(empty(5, 256), 256, 256) is None
    assert linear_fp8(empty(5, 256), 256, 256) is None
    # Only rows that are normed or quantised pass through a warp's registers.
    assert linear(empty(5, 128), 512, 128) is None
    assert linear(empty(5, 8192), 256, 8192) is None
    assert "a token is 128 wide" in linear(empty(5, 128), 512, 128, norm=empty(128))
    assert "a token is 128 wide" in linear_fp8(empty(5, 128), 512, 128)
    assert "a token is 4352 wide" in linear_fp8(empty(5, 4352), 256, 4352)
    assert "not multiples of 256 and 128" in linear(empty(5, 256), 320, 256)
    assert "not multiples of 256 and 128" in linear(empty(5, 192), 256, 192)
    assert "without an element" in linear(empty(5, 256), 0, 256)


def test_more_than_an_int_counts():
    assert linear(empty(2**26, 256), 256, 256) is None
    assert "more than 67108864 tokens" in linear(empty(2**26 + 1, 256), 256, 256)
    assert linear(empty(5, 256), 2**24, 256) is None
    assert "more than 16777216" in linear(empty(5, 256), 2**24 + 256, 256)


def test_other_dtypes():
    assert "float16, not torch.bfloat16" in linear(empty(5, 256, dtype=torch.float16), 256, 256)


def at_an_odd_element(tensor):
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def test_a_sublayer_whose_tensors_start_anywhere(rng):
    tokens = torch.randn(3, 256, generator=rng).to(BF16)
    w = random_weights(FeedForwardWeights, DIMS, {"D": 256, "F": 512}, dtype=BF16, generator=rng)
    q = quantise_feed_forward(w)
    assert config.cuda_refuses_feed_forward(tokens, w, 0.0, None, 1e-6) is None
    assert config.cuda_refuses_feed_forward_fp8(tokens, q, 1e-6) is None
    assert config.cuda_refuses_feed_forward(tokens, w, 0.1, 3, 1e-6) == "there is dropout"
    for name in ("norm_bias", "fc2_weight"):
        moved = w._replace(**{name: at_an_odd_element(getattr(w, name))})
        reason = config.cuda_refuses_feed_forward(tokens, moved, 0.0, None, 1e-6)
        assert reason == f"{name} does not start at a multiple of 16 bytes"
    moved = q._replace(hidden_bound=at_an_odd_element(q.hidden_bound))
    assert "hidden_bound does not" in config.cuda_refuses_feed_forward_fp8(tokens, moved, 1e-6)
    reason = config.cuda_refuses_feed_forward_fp8(at_an_odd_element(tokens), q, 1e-6)
    assert reason == "tokens does not start at a multiple of 16 bytes"


def test_few_tokens_are_left_to_cublas():
    assert config.cuda_declines_bf16(empty(8192, 256)) is None
    assert "below 8192" in config.cuda_declines_bf16(empty(1, 8191, 256))
