"""The int8 core of latent attention on a GPU: what is not finite, and the keys at tiles' ends."""

import pytest
import torch

from snapkernels.ops.latent_attn import config
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.numerics import relative_rms
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
