"""The fp8 modules: that they call the functions with the weights quantised, and keep formats."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from snapkernels import (
    FeedForward,
    Fp8FeedForward,
    Fp8LatentAttention,
    LatentAttention,
    feed_forward_fp8,
    latent_attention_fp8,
    quantise_feed_forward,
    quantise_latent_attention,
)
from snapkernels.testing.numerics import relative_rms

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def tokens(rng):
    return torch.randn(2, 5, 32, generator=rng)


@torch.no_grad()
def test_a_feed_forward_calls_the_function(tokens):
    layer = FeedForward(32, ratio=2, backend="reference").eval()
    quantised, weights = Fp8FeedForward(layer), quantise_feed_forward(layer.weights())
    assert all(torch.equal(a, b) for a, b in zip(quantised.weights(), weights, strict=True))
    assert list(quantised.state_dict()) == list(weights._fields)
    assert not list(quantised.parameters())
    expected = feed_forward_fp8(tokens, weights, eps=1e-6, backend="reference")
    assert torch.equal(quantised(tokens), expected)


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference", "triton"])
def test_a_latent_attention_calls_the_function(backend, tokens):
    layer = LatentAttention(32, 8, backend=backend).eval()
    layer.norm.bias.normal_()
    quantised, weights = Fp8LatentAttention(layer), quantise_latent_attention(layer.weights())
    assert all(torch.equal(a, b) for a, b in zip(quantised.weights(), weights, strict=True))
    assert list(quantised.state_dict()) == list(weights._fields)
    assert not list(quantised.parameters())
    expected = latent_attention_fp8(tokens, weights, num_heads=4, eps=1e-6, backend=backend)
    assert torch.equal(quantised(tokens), expected)


@torch.no_grad()
def test_a_latent_attention_is_near_the_layer_it_was_made_of(tokens):
    layer = LatentAttention(32, 8).eval()
    for name, parameter in layer.named_parameters():
        if name.startswith("norm") or name.endswith("bias"):
            parameter.normal_()
    assert relative_rms(Fp8LatentAttention(layer)(tokens) - tokens, layer(tokens) - tokens) < 0.08


def test_q_k_and_v_are_views_of_one_product(tokens, monkeypatch):
    seen = []

    def core(*heads):
        seen.extend(heads)
        return scaled_dot_product_attention(*heads)

    monkeypatch.setattr("snapkernels.ops.latent_attn.eager_fp8.scaled_dot_product_attention", core)
    layer = Fp8LatentAttention(LatentAttention(32, 8).eval())
    with torch.no_grad():
        layer(tokens)
    assert len({one.untyped_storage().data_ptr() for one in seen}) == 1
    assert {(*one.shape,) for one in seen} == {(2, 4, 5, 8)}


@pytest.mark.parametrize(
    ("layer", "form"),
    [
        (lambda: FeedForward(32), Fp8FeedForward),
        (lambda: LatentAttention(32, 8), Fp8LatentAttention),
    ],
)
def test_a_cast_leaves_e4m3_and_scales_as_they_are(layer, form, tokens):
    layer = layer().eval()
    quantised = form(layer)
    before = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    quantised.to(BF16)
    for name, tensor in quantised.state_dict().items():
        if name in form.fixed:
            assert tensor.dtype in (torch.float8_e4m3fn, FP32)
            assert torch.equal(tensor.float(), before[name].float())
        else:
            assert tensor.dtype == BF16
    with torch.no_grad():
        assert quantised(tokens.to(BF16)).dtype == BF16
        assert quantised.double()(tokens.double()).dtype == torch.float64
    assert form(layer.to("meta")).to(BF16).state_dict().keys() == before.keys()


def test_an_fp32_layer_has_fp32_norms_that_are_cast():
    quantised = Fp8FeedForward(FeedForward(32).eval())
    assert quantised.norm_weight.dtype == FP32
    assert quantised.to(BF16).norm_weight.dtype == BF16
