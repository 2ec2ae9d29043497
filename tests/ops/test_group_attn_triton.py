"""The absorbed read and write in Triton, interpreted: what random inputs of the cases do not show.

`tests/ops/test_proofs.py` holds values, exact probes and seeded bugs of every case.
"""

from math import log2

import pytest
import torch
from torch.nn.functional import linear

from snapkernels import CrossAttentionWeights, env, group_read, group_write, interpreter
from snapkernels.ops.group_attn import config, reference
from snapkernels.ops.group_attn.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.numerics import relative_rms, widened
from snapkernels.testing.proofs import AS_GOOD, SPREADS

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="interpreted kernels only")


@pytest.fixture(autouse=True)
def mended_interpreter():
    """As dispatch mends it, which calls of single kernels do not pass."""
    interpreter.install()


HEADS, INNER, WIDE, NARROW = 2, 24, 20, 36  # NARROW is the latents' width
DTYPES = [torch.bfloat16, torch.float32]


def weights(rng, dtype, updated, read):
    sizes = {"D": updated, "C": read, "I": INNER}
    made = random_weights(CrossAttentionWeights, DIMS, sizes, generator=rng)
    return CrossAttentionWeights(*(w.to(dtype) for w in made))


def inputs(rng, dtype, latents=24, patches=129, groups=2):
    z = torch.randn(1, groups, latents, NARROW, generator=rng).to(dtype)
    x = torch.randn(1, groups, patches, WIDE, generator=rng).to(dtype)
    return z, x


def error_and_limit(op, updated, read, w, mask=None):
    """Relative rms error of Triton's branch against float64, and what it may be.

    That is eager's, but for the luck of few roundings, or what `proofs.judge` calls as good.
    """
    named = {} if mask is None else {"mask": mask}
    wide = widened((updated, read, w))
    exact = reference.cross_attention(*wide, mask, HEADS, 1e-6)
    branch = exact - wide[0]

    def error(y):
        return relative_rms(y.double() - wide[0], branch)

    with torch.no_grad(), nan_filled():
        triton = op(updated, read, w, num_heads=HEADS, backend="triton", **named)
    eager = op(updated, read, w, num_heads=HEADS, backend="eager", **named)
    spread = 1 + SPREADS / (2 * branch.numel()) ** 0.5
    rounded = AS_GOOD[updated.dtype] * error(exact.to(updated.dtype))
    return error(triton), max(error(eager) * spread, rounded)


def both(rng, dtype, change_x=lambda x: x, change_w=lambda w: w, **sizes):
    """Error and limit of a read and of a write with changed patches and weights."""
    z, x = inputs(rng, dtype, **sizes)
    x = change_x(x)
    yield error_and_limit(group_read, z, x, change_w(weights(rng, dtype, NARROW, WIDE)))
    yield error_and_limit(group_write, x, z, change_w(weights(rng, dtype, WIDE, NARROW)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("latents", "patches"), [(24, 129), (17, 5), (1, 129), (128, 5)])
def test_no_worse_than_eager_at_ragged_sizes(latents, patches, dtype, rng):
    for error, limit in both(rng, dtype, latents=latents, patches=patches):
        assert error <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_of_ten_sigma_costs_nothing(dtype, rng):
    """16-bit tokens have their mean taken off after the product, in float32."""
    for error, limit in both(rng, dtype, change_x=lambda x: (x.float() + 10).to(dtype)):
        assert error <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_peaked_softmax(dtype, rng):
    def peaked(w):
        return w._replace(q_weight=w.q_weight * 8)

    for error, limit in both(rng, dtype, change_w=peaked):
        assert error <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_whose_largest_scores_are_far_apart(dtype, rng):
    """Of a read: tokens of one block hardly differ, those of the next do."""

    def uneven(x):
        x[:, :, :64] = x[:, :, :1] + x[:, :, :64] / 16
        return x

    z, x = inputs(rng, dtype, patches=140)
    w = weights(rng, dtype, NARROW, WIDE)
    error, limit = error_and_limit(group_read, z, uneven(x), w._replace(q_weight=w.q_weight * 8))
    assert error <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_blocks_and_groups(dtype, rng):
    """The first block of one group and all of another cannot be read."""
    z, x = inputs(rng, dtype, groups=3, patches=140)
    w = weights(rng, dtype, NARROW, WIDE)
    mask = torch.rand(1, 3, 140, generator=rng) < 0.5
    mask[:, 0, :128] = False
    mask[:, 1] = False
    error, limit = error_and_limit(group_read, z, x, w, mask)
    assert error <= limit
    y = group_read(z, x, w, num_heads=HEADS, mask=mask, backend="triton")
    assert torch.equal(y[:, 1], (z[:, 1].float() + w.o_bias.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad, dtype, rng):
    z, x = inputs(rng, dtype, latents=3, patches=40)
    x[0, 1, 17, 4] = bad
    y = group_read(z, x, weights(rng, dtype, NARROW, WIDE), num_heads=HEADS, backend="triton")
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()
    y = group_write(x, z, weights(rng, dtype, WIDE, NARROW), num_heads=HEADS, backend="triton")
    assert y[0, 1, 17].isnan().all()
    assert y.isfinite().all(-1).sum() == y[..., 0].numel() - 1


def test_any_strides_and_no_batch(rng):
    z, x = inputs(rng, torch.float32, latents=3, patches=40)
    of_read = weights(rng, torch.float32, NARROW, WIDE)
    of_write = weights(rng, torch.float32, WIDE, NARROW)
    moved_z, moved_x = (one.mT.contiguous().mT for one in (z, x))
    for op, w, plain, moved in (
        (group_read, of_read, (z, x), (moved_z, moved_x)),
        (group_write, of_write, (x, z), (moved_x, moved_z)),
    ):
        moved_w = CrossAttentionWeights(*(one.t().contiguous().t() for one in w))
        y = op(*plain, w, num_heads=HEADS, backend="triton")
        assert torch.equal(op(*moved, moved_w, num_heads=HEADS, backend="triton"), y)
        none = op(plain[0][:0], plain[1][:0], w, num_heads=HEADS, backend="triton")
        assert none.shape == plain[0][:0].shape


def test_what_it_refuses(rng):
    z, x = inputs(rng, torch.float64, latents=3, patches=5)
    w = weights(rng, torch.float64, NARROW, WIDE)
    with pytest.raises(ValueError, match="float64"):
        group_read(z, x, w, num_heads=HEADS, backend="triton")
    z, x = inputs(rng, torch.float32, latents=129, patches=5)
    w = weights(rng, torch.float32, WIDE, NARROW)
    with pytest.raises(ValueError, match="129 latents, more than 128"):
        group_write(x, z, w, num_heads=HEADS, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_latents_products(dtype, rng):
    """Each against its equation in float64, an error of one rounding; sums are of rounded A."""
    from snapkernels.ops.group_attn.kernels import triton_latents

    groups, latents = 3, 5

    def drawn(*shape):
        return torch.randn(shape, generator=rng).to(dtype)

    heads, weight, o_weight = drawn(groups * latents, INNER), drawn(INNER, WIDE), drawn(40, INNER)
    gain, shift, q_bias, o_bias = drawn(WIDE), drawn(WIDE), drawn(INNER), drawn(40)
    scale = log2(2.7) / 3
    by_head = heads.double().unflatten(1, (HEADS, -1)).unflatten(0, (groups, -1))
    product = torch.einsum("glhe,hec->ghlc", by_head, weight.double().unflatten(0, (HEADS, -1)))
    A, sums, bias = triton_latents.absorbed_biased(
        heads, weight, gain, shift, q_bias, HEADS, groups, scale
    )
    again, same_sums, _ = triton_latents.absorbed(heads, weight, gain, HEADS, groups, scale)
    assert torch.equal(A, again) and torch.equal(sums, same_sums)
    assert torch.allclose(sums.double(), A.double().sum(-1), atol=1e-5)
    rounding = torch.finfo(dtype).eps
    exact = (product * gain.double() * scale).flatten(1, 2)
    assert relative_rms(A, exact) < rounding
    q_bias_by_head = q_bias.double().unflatten(0, (HEADS, -1))
    exact = product @ shift.double() + torch.einsum("glhe,he->ghl", by_head, q_bias_by_head)
    assert relative_rms(bias, exact.flatten(1) * scale) < 1e-6

    by_o = o_weight.double().unflatten(1, (HEADS, -1))
    exact = torch.einsum("glhe,dhe->ghld", by_head, by_o).flatten(1, 2)
    values = triton_latents.values(heads, o_weight, HEADS, groups)
    assert relative_rms(values, exact) < rounding
    # Of 32 channels 8 b + 2 q + e is where 8 q + 2 b + e was.
    in_order = triton_latents.values(heads, o_weight[:32], HEADS, groups, in_order=True)
    parts = exact[..., :32].unflatten(-1, (4, 4, 2)).transpose(-2, -3)
    assert relative_rms(in_order, parts.flatten(-3)) < rounding

    context = drawn(HEADS, groups * latents, WIDE)
    readable = torch.rand(groups * latents, generator=rng) < 0.5
    exact = torch.einsum(
        "hrc,hec->rhe", context.double(), weight.double().unflatten(0, (HEADS, -1))
    )
    exact = (exact.flatten(1) + q_bias.double()) * readable[:, None]
    for one in (readable, readable.to(torch.uint8)):
        rest = torch.empty_like(heads)
        made = triton_latents.heads_of(context, weight, q_bias, readable_R=one, rest_RI=rest)
        assert relative_rms(made, exact) < rounding and not made[~readable].any()
        assert relative_rms(made.double() + rest.double(), exact) < max(rounding**2, 1e-6)
    factor = torch.randn(HEADS, groups * latents, generator=rng)
    made = triton_latents.heads_of(context, weight, q_bias, factor_HR=factor)
    exact = torch.einsum(
        "hrc,hec->rhe", context.double(), weight.double().unflatten(0, (HEADS, -1))
    ) + torch.einsum("hr,he->rhe", factor.double(), q_bias_by_head)
    assert relative_rms(made, exact.flatten(1)) < rounding
    W, W_sums, delta = triton_latents.absorbed_weighed(heads, weight, gain, context, HEADS, groups)
    assert torch.allclose(W_sums.double(), W.double().sum(-1), atol=1e-5)
    by_row = context.unflatten(1, (groups, latents)).transpose(0, 1).flatten(1, 2)
    assert relative_rms(delta, (W.double() * by_row.double()).sum(-1)) < 1e-6

    residual = drawn(groups * latents, 40)
    exact = linear(heads.double(), o_weight.double(), o_bias.double()) + residual.double()
    assert relative_rms(triton_latents.output(heads, o_weight, o_bias, residual), exact) < rounding


def test_the_ends_of_sums_that_were_products_in_order(rng):
    """Of 32 columns a product has 8 b + 2 q + e as row 8 q + 2 b + e."""
    from snapkernels.ops.group_attn.kernels import triton_sum_ends

    groups, heads, latents, width, parts = 3, 4, 24, 40, 35
    columns = heads * latents
    sums = torch.randn(groups, columns, width, generator=rng)
    average = torch.randn(heads, groups * latents, width, generator=rng).bfloat16()
    found = torch.randn(groups, parts, 2, columns, generator=rng)

    def by_head(one):
        return one.unflatten(1, (heads, latents)).transpose(0, 1).flatten(1, 2)

    product = sums.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).reshape(sums.shape)
    moment, total = found.double().sum(1).unbind(1)
    exact = by_head(sums.double() - moment[..., None])
    dA, totals = triton_sum_ends.scores_sums(product, found, heads)
    assert relative_rms(dA, exact) < 2**-8
    assert relative_rms(totals, by_head(total)) < 1e-6
    dA, _ = triton_sum_ends.scores_sums(product, found, heads, average_HRC=average)
    assert relative_rms(dA, exact - by_head(total[..., None]) * average.double()) < 2**-8
    dW = triton_sum_ends.values_sums(product.bfloat16(), heads)
    assert torch.equal(dW, by_head(sums.bfloat16()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("inner", "width"), [(40, 72), (130, 20)])
def test_the_gradients_of_an_absorbed_matrix(inner, width, biased, dtype, rng):
    """Against float64, of scaled = weight gain scale and shifted = weight shift, by autograd."""
    from snapkernels.ops.group_attn.kernels import triton_weight_grads

    shapes = (width, inner), (width,), (width,)
    weight, gain, shift = (torch.randn(one, generator=rng).to(dtype) for one in shapes)
    weight, scale = weight.t(), log2(2.7) / 3
    d_scaled = torch.randn(inner, width, generator=rng)
    d_shifted = torch.randn(inner, generator=rng) * biased
    wide = [one.double().requires_grad_() for one in (weight, gain, shift)]
    exact = wide[0] * wide[1] * scale, wide[0] @ wide[2]
    exact_grads = torch.autograd.grad(exact, wide, (d_scaled.double(), d_shifted.double()))
    call = weight, gain, shift, scale, d_scaled, d_shifted
    with nan_filled():
        made = triton_weight_grads.of_absorbed(*call, again=True)
        some = triton_weight_grads.of_absorbed(*call, again=False)
    assert made.weight.dtype == made.scaled.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert relative_rms(made.weight, exact_grads[0]) < rounding
    assert relative_rms(made.scaled, exact[0].detach()) < rounding
    assert relative_rms(made.gain, exact_grads[1]) < 1e-6
    assert torch.allclose(made.shift.double(), exact_grads[2], atol=1e-4)
    assert torch.allclose(made.shifted.sum(0).double(), exact[1].detach(), atol=1e-5)
    assert all(map(torch.equal, made[:3], some[:3]))
    assert not some.scaled.numel() and not some.shifted.numel()


@pytest.mark.parametrize("latents", [1, 5, 8, 16, 17, 24, 31, 64, 96, 100, 128])
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("item", [2, 4])
def test_the_scores_blocks_hold_every_head_and_latent(item, heads, latents):
    blocks = config.score_blocks(item, heads, latents)
    pieces = [blocks.first] + [blocks.rest] * (blocks.rest > 0)
    assert sum(pieces) >= latents and min(pieces) * blocks.heads >= config.TRITON_LEAST_COLUMNS
    for one in (*pieces, blocks.heads):
        assert one & (one - 1) == 0
    if heads == 16 and latents in (24, 96):
        assert sum(pieces) == latents  # without padding
