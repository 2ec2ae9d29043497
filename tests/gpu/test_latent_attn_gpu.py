"""Latent attention in fp8 on a GPU: what is not finite, the keys at tiles' ends, CUDA graphs."""

from dataclasses import replace

import pytest
import torch

from snapkernels import SelfAttentionWeights, latent_attention_fp8, quantise_latent_attention
from snapkernels.ops.latent_attn import cases, config
from snapkernels.ops.latent_attn.spec_fp8 import SLACK
from snapkernels.ops.latent_attn.weights import DIMS
from snapkernels.registry import OPS
from snapkernels.testing.cases import make_values
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.numerics import relative_rms, widened
from snapkernels.testing.probes import borders

pytestmark = pytest.mark.gpu

NAN, INF = float("nan"), float("inf")


def attended(qkv_BLJ, heads):
    from snapkernels.ops.latent_attn.kernels.triton_core import attended
    from snapkernels.ops.latent_attn.kernels.triton_keys import quantised_keys

    blocks = config.core_blocks(qkv_BLJ.shape[1], qkv_BLJ.shape[2] // (3 * heads))
    with nan_filled():
        return attended(qkv_BLJ, quantised_keys(qkv_BLJ, heads, blocks), heads, blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("latents", "channels"), [(1, 16), (130, 80), (700, 64), (768, 128)])
def test_it_is_softmax_attention(latents, channels, dtype, gpu):
    qkv = torch.randn(2, latents, 3 * 2 * channels, device=gpu).to(dtype)
    q, k, v = qkv.double().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    P = (q @ k.transpose(-1, -2) * channels**-0.5).softmax(-1)
    found = attended(qkv, 2)
    assert relative_rms(found, (P @ v).transpose(1, 2).flatten(2)) < 0.02


@pytest.mark.parametrize("latents", [5, 128, 200, 257])
def test_every_key_counts_once(latents, gpu):
    qkv = torch.zeros(1, latents, 3 * 64, device=gpu)
    qkv[..., 64:128] = 1
    values = torch.arange(-32.0, 32.0, device=gpu)
    for position in borders(latents):
        marked = qkv.clone()
        marked[0, position, 128:] = values
        expected = (values / latents).expand(1, latents, 64)
        torch.testing.assert_close(attended(marked, 1), expected, rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_what_is_not_finite_reaches_all_that_reads_it_and_nothing_else(part, bad, gpu):
    """In the last tile, whose keys weigh next to nothing."""
    qkv = torch.randn(2, 140, 3 * 2 * 64, device=gpu).bfloat16()
    qkv[..., :128] = 0
    qkv[..., 0], qkv[:, :128, 128] = 30, 30  # scores of head 0
    clean = attended(qkv, 2)
    assert clean.isfinite().all()
    qkv[1, 139, "qkv".index(part) * 128 + 5] = bad
    found = attended(qkv, 2)
    spoiled = torch.zeros(2, 140, 128, dtype=torch.bool, device=gpu)
    spoiled[1, 139 if part == "q" else slice(None), :64] = True
    assert not found[spoiled].isfinite().any()
    assert torch.equal(found[~spoiled], clean[~spoiled])


@pytest.fixture(params=[64, 128], ids=["heads of 64", "heads of 128"])
def sublayer(request, gpu):
    """CUDA's, of two or four heads: with those of 128 its core is of integers."""
    sizes = {"D": 256, "I": 256}
    rng = torch.Generator().manual_seed(0)
    w = random_weights(SelfAttentionWeights, DIMS, sizes, dtype=torch.bfloat16, generator=rng)
    weights = quantise_latent_attention(SelfAttentionWeights(*(one.to(gpu) for one in w)))
    heads = 256 // request.param

    def run(latents):
        assert config.cuda_has_integers(latents, 256, heads) == (request.param == 128)
        return latent_attention_fp8(latents, weights, num_heads=heads, backend="cuda")

    return run


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_latent_that_is_not_finite_spoils_its_video_alone(sublayer, bad, gpu):
    latents = torch.randn(3, 200, 256, device=gpu).bfloat16()
    with nan_filled():
        clean = sublayer(latents)
        latents[1, 150, 7] = bad
        found = sublayer(latents)
    assert clean.isfinite().all() and not found[1].isfinite().any()
    assert torch.equal(found[::2], clean[::2])


def test_a_graph_of_it_gives_the_same_bits_time_after_time(sublayer, gpu):
    latents = torch.randn(4, 384, 256, device=gpu).bfloat16()
    expected = sublayer(latents)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sublayer(latents)
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)


def test_keys_beside_a_sink_cost_no_more_than_the_bar(gpu):
    """In every head of 128 a key weighs 300 others: its tile's others have a P of 1 or none."""
    spec = OPS["latent_attention_fp8"].spec
    case = replace(
        next(case for case in spec.cases if case.name == "sink-tiles-of-128"),
        change=cases._sink(128),
    )
    squares = {"cuda": 0.0, "eager": 0.0}
    for seed in range(8):
        call = make_values(spec, case, torch.bfloat16, gpu, seed=seed)
        latents, weights, heads, eps = call
        assert config.cuda_has_integers(latents, weights.o_weight.shape[1], heads)
        exact = spec.reference(*widened(call)) - latents.double()
        for backend in squares:
            found = latent_attention_fp8(
                latents, weights, num_heads=heads, eps=eps, backend=backend
            )
            squares[backend] += relative_rms(found.double() - latents.double(), exact) ** 2
    assert squares["cuda"] < SLACK**2 * squares["eager"]
