"""The eager backend at the paper's shapes on a GPU, against the float64 equations."""

import pytest
import torch

from snapkernels import (
    CrossAttentionWeights,
    FeedForwardWeights,
    SelfAttentionWeights,
    feed_forward,
    group_read,
    group_write,
    latent_attention,
    patchify,
    unpatchify,
)
from snapkernels.ops.feed_forward.weights import DIMS as FF_DIMS
from snapkernels.ops.group_attn.weights import DIMS as CROSS_DIMS
from snapkernels.ops.latent_attn.weights import DIMS as SELF_DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms
from snapvideo_core.config import FIT_3_9B, FIT_3_9B_UP, FIT_500M

pytestmark = pytest.mark.gpu
PRESETS = [FIT_500M, FIT_3_9B, FIT_3_9B_UP]
DTYPES = [torch.bfloat16, torch.float32]
# A branch of one sublayer: bf16 rounds every intermediate once, float32 (TF32 off) sums long rows.
LIMITS = {torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


def draw(*shape):
    return torch.randn(shape, device="cuda")


def check(op, tokens, others, weights, dtype, **options):
    """Branch of `op` in `dtype` against the reference in float64 on the same rounded inputs."""
    tokens, others = tokens.to(dtype), [other.to(dtype) for other in others]
    weights = type(weights)(*(w.to(dtype) for w in weights))
    out = op(tokens, *others, weights, **options)
    exact = op(
        tokens.double(),
        *(other.double() for other in others),
        type(weights)(*(w.double() for w in weights)),
        backend="reference",
        **options,
    )
    assert out.dtype == dtype
    branch, exact_branch = out.double() - tokens.double(), exact - tokens.double()
    assert relative_rms(branch, exact_branch) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", PRESETS, ids=lambda c: c.name)
def test_read_and_write(config, dtype, gpu):
    torch.manual_seed(0)
    groups, heads = config.num_groups, config.patch_dim // config.patch_head_dim
    latents = draw(1, groups, config.num_latents // groups, config.latent_dim)
    patches = draw(1, groups, config.group_tokens, config.patch_dim)
    for op, tokens, other in ((group_read, latents, patches), (group_write, patches, latents)):
        sizes = {"D": tokens.shape[-1], "C": other.shape[-1], "I": config.patch_dim}
        weights = random_weights(CrossAttentionWeights, CROSS_DIMS, sizes, device=gpu)
        check(op, tokens, [other], weights, dtype, num_heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(133, 7, 1), (5, 0, 64)], ids=["ragged", "nothing to read"])
def test_conditioning_read(lengths, dtype, gpu):
    torch.manual_seed(0)
    latents, tokens = draw(3, 1, 768, 3072), draw(3, 1, 133, 1024)
    mask = torch.arange(133, device=gpu) < torch.tensor(lengths, device=gpu)[:, None]
    sizes = {"D": 3072, "C": 1024, "I": 1024}
    weights = random_weights(CrossAttentionWeights, CROSS_DIMS, sizes, device=gpu)
    options = {"num_heads": 16, "mask": mask[:, None]}
    check(group_read, latents, [tokens], weights, dtype, **options)
    leaf = tokens.to(dtype).requires_grad_()
    typed = CrossAttentionWeights(*(w.to(dtype) for w in weights))
    group_read(latents.to(dtype), leaf, typed, **options).square().sum().backward()
    assert leaf.grad.isfinite().all()
    read = leaf.grad.any(-1)[:, 0]
    assert torch.equal(read, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", PRESETS[:2], ids=lambda c: c.name)
def test_latent_attention(config, dtype, gpu):
    torch.manual_seed(0)
    sizes = {"D": config.latent_dim, "I": config.latent_dim}
    weights = random_weights(SelfAttentionWeights, SELF_DIMS, sizes, device=gpu)
    heads = config.latent_dim // config.latent_head_dim
    latents = draw(2, config.num_latents, config.latent_dim)
    check(latent_attention, latents, [], weights, dtype, num_heads=heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "dim"), [(147456, 1024), (768, 3072)])
def test_feed_forward(tokens, dim, dtype, gpu):
    torch.manual_seed(0)
    weights = random_weights(FeedForwardWeights, FF_DIMS, {"D": dim, "F": 4 * dim}, device=gpu)
    check(feed_forward, draw(tokens, dim), [], weights, dtype)


@pytest.mark.parametrize("config", PRESETS[1:], ids=lambda c: c.name)
def test_patchify_is_exact(config, gpu):
    torch.manual_seed(0)
    size = (config.frames, config.padded_height, config.width)
    video = draw(2, 6, *size).bfloat16()
    tokens = [patchify(video, group=config.group, backend=b) for b in ("reference", "eager")]
    assert torch.equal(*tokens)
    assert torch.equal(unpatchify(tokens[1], size=size, group=config.group), video)
