"""The absorbed backward, interpreted: what random inputs of the cases do not show.

`tests/ops/test_proofs.py` holds the gradients of every case, and seeded bugs of each.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from snapkernels import CrossAttentionWeights, env, group_read, group_write
from snapkernels.ops.group_attn.weights import DIMS
from snapkernels.registry import OPS
from snapkernels.testing.cases import make_values
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import widened
from snapkernels.testing.proofs import NEAR

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="interpreted kernels only")

HEADS, INNER, WIDE, NARROW, LATENTS = 2, 24, 20, 36, 5  # NARROW is the latents' width
OPS_OF = [group_read, group_write]
DTYPES = [torch.bfloat16, torch.float32]


def call_of(op, rng, dtype, groups=2, patches=9):
    """Updated, read and weights."""
    z = torch.randn(1, groups, LATENTS, NARROW, generator=rng)
    x = torch.randn(1, groups, patches, WIDE, generator=rng)
    tokens = (z, x) if op is group_read else (x, z)
    sizes = {"D": tokens[0].shape[3], "C": tokens[1].shape[3], "I": INNER}
    weights = random_weights(CrossAttentionWeights, DIMS, sizes, generator=rng)
    return [*(one.to(dtype) for one in tokens), weights._make(w.to(dtype) for w in weights)]


def gradients(op, call, backend, wanted=None, **options):
    """Those of updated, read and every weight, or of the `wanted`, by position."""
    updated, read, weights = call
    leaves = [one.detach().clone() for one in (updated, read, *weights)]
    wanted = range(len(leaves)) if wanted is None else wanted
    for position in wanted:
        leaves[position].requires_grad_()
    y = op(*leaves[:2], weights._make(leaves[2:]), num_heads=HEADS, backend=backend, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return torch.autograd.grad(y, [leaves[i] for i in wanted], grad)


def errors(op, call, **options):
    """(Triton's, eager's) of every gradient, over its rms or a tenth of the largest's."""
    exact = gradients(op, widened(tuple(call)), "reference", **options)
    scales = [one.square().mean().sqrt() for one in exact]
    for triton, eager, wide, scale in zip(
        gradients(op, call, "triton", **options),
        gradients(op, call, "eager", **options),
        exact,
        scales,
        strict=True,
    ):
        over = torch.maximum(scale, max(scales) / 10)
        yield tuple(
            ((one.double() - wide).square().mean().sqrt() / over).item() for one in (triton, eager)
        )


# Of a few numbers the error is luck; a wrong gradient is not near.
FLOOR = {torch.bfloat16: 1e-2, torch.float32: 3e-6}
DRAWS = 4


def hold(op, calls, dtype, **options):
    """The rms of the errors of several calls, of Triton's gradients, is near eager's or small."""
    squares = sum(torch.tensor(list(errors(op, call, **options))).square() for call in calls)
    for position, (triton, eager) in enumerate(squares.div(len(calls)).sqrt().tolist()):
        assert triton <= max(NEAR * eager, FLOOR[dtype]), position


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS_OF)
def test_a_mean_of_ten_sigma(op, dtype, rng):
    calls = [call_of(op, rng, dtype) for _ in range(DRAWS)]
    for call in calls:
        patches = 1 if op is group_read else 0
        call[patches] = (call[patches].float() + 10).to(dtype)
    hold(op, calls, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS_OF)
def test_a_peaked_softmax(op, dtype, rng):
    calls = [call_of(op, rng, dtype) for _ in range(DRAWS)]
    for call in calls:
        call[2] = call[2]._replace(q_weight=8 * call[2].q_weight)
    hold(op, calls, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS_OF)
def test_several_tiles_and_a_gain_of_zero(op, dtype, rng):
    updated, read, weights = call_of(op, rng, dtype, groups=1, patches=140)
    patches = "kv_norm_weight" if op is group_read else "q_norm_weight"
    gain = getattr(weights, patches).clone()
    gain[::3] = 0
    hold(op, [[updated, read, weights._replace(**{patches: gain})]], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cannot_be_read_has_no_gradient(dtype, rng):
    latents, patches, weights = call_of(group_read, rng, dtype, groups=3, patches=140)
    mask = torch.rand(1, 3, 140, generator=rng) < 0.5
    mask[:, 0, :128] = False
    mask[:, 1] = False
    hold(group_read, [[latents, patches, weights]], dtype, mask=mask)
    d_latents, d_patches, *_ = gradients(
        group_read, [latents, patches, weights], "triton", mask=mask
    )
    assert not d_patches[~mask].any() and d_patches[mask].all(-1).any()
    grad = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(d_latents[:, 1], grad[:, 1])


@pytest.mark.parametrize("op", OPS_OF)
def test_a_key_bias_has_a_gradient_of_zero(op, rng):
    """It adds one number to all scores of a query."""
    k_bias = 2 + CrossAttentionWeights._fields.index("k_bias")
    assert not gradients(op, call_of(op, rng, torch.float32), "triton")[k_bias].any()


@pytest.mark.parametrize("op", OPS_OF)
def test_two_runs_agree_in_every_bit_and_so_do_fewer_gradients(op, rng):
    call = call_of(op, rng, torch.bfloat16, patches=140)
    once, twice = (gradients(op, call, "triton") for _ in range(2))
    assert all(map(torch.equal, once, twice))
    for wanted in ((0,), (1,), (5, 12)):
        some = gradients(op, call, "triton", wanted)
        assert all(torch.equal(one, once[i]) for one, i in zip(some, wanted, strict=True))


@pytest.mark.parametrize("op", OPS_OF)
def test_what_is_saved_is_no_copy_of_the_tokens(op, rng):
    updated, read, weights = call_of(op, rng, torch.bfloat16, patches=140)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved.append(one) or one, lambda one: one
    ):
        op(updated.requires_grad_(), read, weights, num_heads=HEADS, backend="triton")
    inputs = {one.data_ptr() for one in (updated, read, *weights)}
    more = [one for one in saved if one.data_ptr() not in inputs]
    moments = 2 * [(1, 2, 140)]
    read = [(HEADS, 1, 2, 5, WIDE), *2 * [(1, 2, 5, INNER)], (1, 2, HEADS, 5), *moments]
    forms = {"group_read": read}
    forms["group_write"] = 2 * [(1, 2, 5, INNER)] + [(1, 2, 140, HEADS, 5)] + moments
    assert [tuple(one.shape) for one in more] == forms[op.__name__]


@pytest.mark.parametrize("op", OPS_OF)
def test_a_checkpoint_recomputes_the_same(op, rng):
    updated, read, weights = call_of(op, rng, torch.bfloat16)
    expected = gradients(op, [updated, read, weights], "triton", (0,))

    def block(one):
        return op(one, read, weights, num_heads=HEADS, backend="triton")

    leaf = updated.clone().requires_grad_()
    y = checkpoint(block, leaf, use_reentrant=False)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], expected[0])


@pytest.mark.parametrize("op", OPS_OF)
def test_there_is_no_second_derivative(op, rng):
    updated, read, weights = call_of(op, rng, torch.float32)
    y = op(updated.requires_grad_(), read, weights, num_heads=HEADS, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), updated, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op.__name__} has no second derivative"):
        torch.autograd.grad(grad.sum(), updated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_write_with_a_large_bias_of_scores(dtype, rng):
    """What is the same for all scores of a head is not in the patches' gradient."""
    calls = [call_of(group_write, rng, dtype) for _ in range(DRAWS)]
    for call in calls:
        w = call[2]
        call[2] = w._replace(k_bias=w.k_bias + 2, q_bias=w.q_bias + 6, o_weight=30 * w.o_weight)
    squares = sum(torch.tensor(list(errors(group_write, call))).square() for call in calls)
    triton, eager = squares[0].div(DRAWS).sqrt()
    assert triton <= NEAR * eager


def test_no_latents_write_their_bias(rng):
    patches, latents, weights = call_of(group_write, rng, torch.float32)
    call = patches, latents[:, :, :0], weights
    y = group_write(*call, num_heads=HEADS)
    torch.testing.assert_close(y, patches + weights.o_bias)
    with pytest.raises(ValueError, match="a group has no latents"):
        group_write(*call, num_heads=HEADS, backend="triton")


@pytest.mark.parametrize("name", ["group_read", "group_write"])
def test_a_trace_keeps_something_where_absorption_pays(name):
    spec = OPS[name].spec
    kept = set()
    for case in spec.cases:
        values = make_values(spec, case, case.dtypes[0], "meta")
        pays = spec.backend("triton").declines(*values) is None
        assert spec.keeps(spec.check(*values)) == pays, case.name
        kept.add(pays)
    assert kept == {True, False}
