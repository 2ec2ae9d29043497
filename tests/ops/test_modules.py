"""The modules: heads, parameters, and that they call the functions with them."""

import pytest
import torch

from snapkernels import (
    FeedForward,
    GroupRead,
    GroupWrite,
    LatentAttention,
    feed_forward,
    group_read,
    group_write,
    latent_attention,
)


def test_they_call_the_functions_with_their_own_weights(rng):
    latents, patches = torch.randn(1, 2, 3, 8, generator=rng), torch.randn(1, 2, 5, 12)
    read, write = GroupRead(8, 12, 4), GroupWrite(12, 8, 4)
    attend, ff = LatentAttention(8, 2), FeedForward(8, ratio=3)
    heads = (read.num_heads, write.num_heads, attend.num_heads)
    assert heads == (2, 2, 4)  # of the narrower side
    pairs = [
        (read(latents, patches), group_read(latents, patches, read.weights(), num_heads=2)),
        (write(patches, latents), group_write(patches, latents, write.weights(), num_heads=2)),
        (attend(latents[0]), latent_attention(latents[0], attend.weights(), num_heads=4)),
        (ff(latents), feed_forward(latents, ff.weights())),
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert ff.weights().fc1_weight.shape == (24, 8)


@pytest.mark.parametrize(
    ("latent_dim", "patch_dim", "head_dim", "group", "absorbs"),
    [
        (3072, 1024, 64, (24, 4608), True),  # the upsampler: 384 columns for 1024
        (3072, 1024, 64, (96, 320), False),
        (1024, 768, 48, (64, 320), False),
        (3072, 1024, 64, None, False),
    ],
)
def test_a_read_or_write_that_knows_its_groups_says_whether_it_absorbs(
    latent_dim, patch_dim, head_dim, group, absorbs
):
    with torch.device("meta"):
        read = GroupRead(latent_dim, patch_dim, head_dim, group=group)
        write = GroupWrite(patch_dim, latent_dim, head_dim, group=group)
    assert (read.absorbs, write.absorbs) == (absorbs, absorbs)


def test_every_weight_is_a_parameter_under_its_name():
    state = GroupRead(8, 12, 4).state_dict()
    weights = GroupRead(8, 12, 4).weights()
    assert [name.replace(".", "_") for name in state] == list(weights._fields)


@pytest.mark.parametrize("head_dim", [3, 0, -4])
def test_heads_that_do_not_divide_are_named(head_dim):
    for build in (
        lambda: GroupRead(8, 16, head_dim),
        lambda: GroupWrite(16, 8, head_dim),
        lambda: LatentAttention(8, head_dim),
    ):
        with pytest.raises(ValueError, match=f"head_dim={head_dim} must be above 0 and divide"):
            build()


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='flash' is not one of"):
        FeedForward(8, backend="flash")(torch.zeros(1, 8))
