"""The core of latent attention in Triton, interpreted: what the cases of the spec do not show.

`tests/ops/test_proofs.py` holds values and seeded bugs of every case.
"""

from types import SimpleNamespace

import pytest
import torch

from snapkernels import (
    SelfAttentionWeights,
    env,
    interpreter,
    latent_attention_fp8,
    quantise_latent_attention,
)
from snapkernels.ops.latent_attn import config
from snapkernels.ops.latent_attn.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.numerics import relative_rms, same_bits
from snapkernels.testing.probes import borders

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="interpreted kernels only")

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def kernels():
    """The kernels' modules, with the interpreter mended as dispatch mends it."""
    interpreter.install()
    from snapkernels.ops.latent_attn.kernels import triton_core, triton_int8, triton_keys

    return SimpleNamespace(core=triton_core, keys=triton_keys, int8=triton_int8)


def attended(kernels, qkv_BLJ, heads):
    """The context, (B, L, I)."""
    blocks = config.core_blocks(qkv_BLJ.shape[1], qkv_BLJ.shape[2] // (3 * heads))
    keys = kernels.keys.quantised_keys(qkv_BLJ, heads, blocks)
    return kernels.core.attended(qkv_BLJ, keys, heads, blocks)


def exact(qkv_BLJ, heads):
    q, k, v = qkv_BLJ.double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    P = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (P @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keys_and_values_of_a_tile_are_integers_of_one_scale(dtype, kernels, rng):
    qkv = torch.randn(2, 150, 3 * 2 * 20, generator=rng).to(dtype)
    qkv[0, 3, 40] = 40  # one key, channel 0 of head 0
    blocks = config.core_blocks(150, 20)
    with nan_filled():
        keys = kernels.keys.quantised_keys(qkv, 2, blocks)
    padded = torch.zeros(2, 256, 3, 2, 32)
    padded[:, :150, ..., :20] = qkv.float().unflatten(-1, (3, 2, 20))
    _, k, v = padded.view(2, 2, 128, 3, 2, 32).permute(3, 0, 4, 1, 2, 5).flatten(1, 2)
    for numbers, scale, values in (
        (keys.k, keys.scales[..., 0], k),
        (keys.v.transpose(-1, -2), keys.scales[..., 1], v),
    ):
        torch.testing.assert_close(scale, values.abs().amax((2, 3)) / 127)
        scale = scale[..., None, None]
        assert ((numbers * scale - values).abs() <= scale * (0.5 + 1e-4)).all()
        assert numbers.abs().amax((2, 3)).eq(127).all()
    assert torch.equal(keys.sums, keys.v.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("channels", [1, 16, 20, 48, 64, 80, 128])
@pytest.mark.parametrize("latents", [1, 17, 130])
def test_heads_of_any_width_and_any_number_of_latents(latents, channels, kernels, rng):
    qkv = torch.randn(2, latents, 3 * 2 * channels, generator=rng)
    with nan_filled():
        found = attended(kernels, qkv, 2)
    assert found.dtype == torch.float32
    assert relative_rms(found, exact(qkv, 2)) < (0.04 if channels == 1 else 0.02)


@pytest.mark.parametrize("latents", [5, 128, 200, 257])
def test_every_key_counts_once(latents, kernels):
    """With queries of zero the softmax is uniform: a marked value comes out over their number."""
    qkv = torch.zeros(1, latents, 3 * 16)
    qkv[..., 16:32] = 1
    for position in borders(latents):
        marked = qkv.clone()
        marked[0, position, 32:] = torch.arange(-8.0, 8.0)
        expected = (torch.arange(-8.0, 8.0) / latents).expand(1, latents, 16)
        torch.testing.assert_close(attended(kernels, marked, 1), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_what_is_not_finite_reaches_all_that_reads_it_and_nothing_else(part, bad, kernels, rng):
    """In the last tile, whose keys weigh next to nothing."""
    qkv = torch.randn(2, 140, 3 * 2 * 16, generator=rng)
    qkv[..., :32] = 0
    qkv[..., 0], qkv[:, :128, 32] = 30, 30  # scores of head 0
    clean = attended(kernels, qkv, 2)
    assert clean.isfinite().all()
    qkv[1, 139, "qkv".index(part) * 32 + 5] = bad
    found = attended(kernels, qkv, 2)
    spoiled = torch.zeros(2, 140, 32, dtype=torch.bool)
    spoiled[1, 139 if part == "q" else slice(None), :16] = True
    assert not found[spoiled].isfinite().any()
    assert torch.equal(found[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("size", [2.0**-149, 1e-40, 1e-20, 1e15])
def test_numbers_of_any_size_stay_finite(size, kernels, rng):
    qkv = torch.randn(1, 20, 3 * 16, generator=rng)
    qkv[..., :16] *= 1e-15
    qkv[..., 16:] = (qkv[..., 16:] * size).clamp(-3 * size, 3 * size)
    found = attended(kernels, qkv, 1)
    assert found.isfinite().all() and found.abs().max() <= 4 * size


@pytest.mark.parametrize("size", [20, 200, 300, 1000, 60000])
def test_scores_of_any_size(size, kernels, rng):
    """Two kinds of keys, one of which takes all, by up to 2^33; the largest P stays the largest."""
    qkv = torch.randn(1, 150, 3 * 16, generator=rng)
    taken = torch.arange(150) % 3 == 1
    qkv[..., :16] = size
    qkv[..., 16:32] = torch.where(taken, size, -size)[:, None]
    found = attended(kernels, qkv.half(), 1)
    expected = qkv[:, taken, 32:].mean(1, keepdim=True).expand(found.shape)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-3)


def test_tiles_past_2_31_elements(kernels, monkeypatch, rng):
    """One program of a launch whose others would take hours; memory is there once it is touched."""
    from triton.runtime.interpreter import interpreter_builder

    shifted, run = SimpleNamespace(by=0), interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: run(x + shifted.by, y, z)
    )
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *dims: None)
    interpreter_builder.grid_dim = (2**31 - 1, 1, 1)
    latents, blocks = 32, config.core_blocks(32, 32)
    assert blocks == (32, 32, 32)
    videos = 2**31 // (latents * 32) + 1
    qkv = torch.empty(videos, latents, 3 * 32, dtype=torch.bfloat16)
    k = torch.empty(videos, 1, 32, 32, dtype=torch.int8)
    v, scales, sums = torch.empty_like(k), torch.empty(videos, 1, 2), torch.empty(videos, 1, 32)
    context = torch.empty(videos, latents, 32, dtype=torch.bfloat16)
    qkv[-1] = torch.randn(latents, 96, generator=rng)
    shifted.by = videos - 1
    of_heads, tensors = (1, 32), (k, v, scales, sums.int())
    kernels.keys.keys_kernel[(1,)](qkv, *tensors, latents, *of_heads, *blocks[1:])
    temperature = kernels.core.LOG2_E * 32**-0.5
    kernels.core.core_kernel[(1,)](qkv, *tensors, context, latents, temperature, *of_heads, *blocks)
    assert relative_rms(context[-1:], exact(qkv[-1:], 1)) < 0.02


def test_what_it_refuses(rng):
    def call(dim, inner, heads, dtype=torch.float32, backend="triton"):
        sizes = {"D": dim, "I": inner}
        w = random_weights(SelfAttentionWeights, DIMS, sizes, dtype=dtype, generator=rng)
        latents = torch.zeros(1, 2, dim, dtype=dtype)
        w = quantise_latent_attention(w)
        return latent_attention_fp8(latents, w, num_heads=heads, backend=backend)

    with pytest.raises(ValueError, match="a head has 129 channels, more than 128"):
        call(16, 258, 2)
    with pytest.raises(ValueError, match="a head has an odd number of channels, 33"):
        call(16, 66, 2)
    with pytest.raises(ValueError, match="the inner width is 16512, more than 16384"):
        call(2, 16512, 129)
    with pytest.raises(ValueError, match="tokens are torch"):
        call(16, 16, 2, torch.float64)
    assert call(16, 256, 2).isfinite().all()


def test_two_runs_agree_in_every_bit(kernels, rng):
    qkv = torch.randn(1, 200, 3 * 32, generator=rng).bfloat16()
    assert same_bits(attended(kernels, qkv, 1), attended(kernels, qkv, 1))
