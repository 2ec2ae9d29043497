"""group_read and group_write choose between two algorithms, by their operations."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from snapkernels.dispatch import choose, explain
from snapkernels.ops.group_attn import config, cost
from snapkernels.registry import OPS
from snapkernels.testing.cases import call, leaves, make_values
from snapkernels.testing.cost import floor_ms, least_flops

BF16 = torch.bfloat16
READ, WRITE = OPS["group_read"], OPS["group_write"]
PAPER = ("up", "3.9b-b16", "500m-b64")


def case_of(op, name):
    return next(case for case in op.spec.cases if case.name == name)


def product(rows, inner, columns):
    return 2 * rows * inner * columns


@pytest.mark.parametrize("name", PAPER)
def test_operations_are_counted_by_hand(name):
    """Matrix by matrix, of one group: latents z, patches x, inner width i."""
    sizes = dict(case_of(READ, name).sizes) | {"num_heads": 16}
    latents, patches, z, x, i = (sizes[key] for key in "LNDCI")
    rows = 16 * latents
    scores_and_values = 2 * product(latents, i, patches)
    of_latents, of_patches = product(latents, z, i), product(patches, x, i)
    projected = 2 * of_latents + 2 * of_patches + scores_and_values
    assert cost.projected_read_flops(sizes) == projected
    # q; q W_k by head; scores; weighted patches; W_v by head; o
    absorbed = of_latents + product(latents, i, x) + product(rows, x, patches)
    absorbed += product(rows, patches, x) + product(latents, x, i) + of_latents
    assert cost.absorbed_read_flops(sizes) == absorbed
    sizes |= {"D": x, "C": z}
    assert cost.projected_write_flops(sizes) == projected
    # k, v; k W_q and v W_o by head; scores; weighted latents
    absorbed = 2 * of_latents + 2 * product(latents, i, x) + 2 * product(patches, x, rows)
    assert cost.absorbed_write_flops(sizes) == absorbed


@pytest.mark.parametrize("op", [READ, WRITE], ids=lambda op: op.spec.name)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("up", None),
        ("3.9b-b16", "absorbed 3.62 GFLOP a group, projected 2.68"),
        ("500m-b64", "absorbed 1.36 GFLOP a group, projected 1.02"),
    ],
)
def test_absorption_declines_where_it_is_more_work(op, name, reason):
    values = make_values(op.spec, case_of(op, name), BF16, "meta")
    declines = getattr(cost, f"absorbed_declines_{op.spec.name.removeprefix('group_')}")
    assert declines(*values) == reason
    least = least_flops(op.spec, case_of(op, name), "fwd")
    assert (least < op.spec.flops(op.spec.check(*values))) == (reason is None)


@pytest.mark.parametrize(("op", "least"), [(READ, 16384), (WRITE, 4096)])
def test_few_patches_are_not_absorbed(op, least):
    declines = getattr(cost, f"absorbed_declines_{op.spec.name.removeprefix('group_')}")
    case = case_of(op, "up")
    for groups, reason in (
        (least // 4096, None),
        (1, f"2048 patch tokens in all, fewer than {least}"),
    ):
        sizes = dict(case.sizes) | {"G": groups, "N": 4096 if reason is None else 2048}
        assert declines(*make_values(op.spec, replace(case, sizes=sizes), BF16, "meta")) == reason


def test_the_floor_is_that_of_the_least_work():
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0}
    floor = floor_ms(READ.spec, case_of(READ, "up"), "fwd", BF16, ceilings)
    assert floor == pytest.approx(32 * 7650410496 / 700e9)


def test_explain_has_both_algorithms_and_why_a_backend_declines():
    values = make_values(WRITE.spec, case_of(WRITE, "odd"), torch.float32, "cpu")
    assert choose(WRITE.spec, None, values).name == "eager"
    text = explain(WRITE.spec, *values)
    assert "absorbed 8.42e-05 GFLOP, projected 6.71e-05 GFLOP" in text
    assert (
        "triton     can, but declines: absorbed 1.4e-05 GFLOP a group, projected 1.12e-05" in text
    )


def strided(values):
    return tuple(
        one.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if isinstance(one, torch.Tensor) and one.dim() == 4
        else one
        for one in values
    )


@pytest.mark.parametrize("backend", [None, "eager", "reference"])
@pytest.mark.parametrize("op", [READ, WRITE], ids=lambda op: op.spec.name)
def test_the_output_is_contiguous_whatever_the_strides(op, backend):
    values = strided(make_values(op.spec, case_of(op, "odd"), torch.float32, "cpu"))
    assert not values[0].is_contiguous()
    assert call(op, values, backend).is_contiguous()


def test_a_mask_is_part_of_the_registered_op():
    values = make_values(READ.spec, case_of(READ, "masked"), torch.float32, "cpu")
    for leaf in leaves(READ.spec, values):
        leaf.requires_grad_()
    flat = (*READ.spec.flatten(values), *values[len(READ.spec.inputs) :])
    torch.library.opcheck(torch.ops.snapkernels.group_read.default, flat)


@pytest.mark.parametrize("op", [READ, WRITE], ids=lambda op: op.spec.name)
def test_work_is_counted_once(op):
    values = make_values(op.spec, case_of(op, "odd"), torch.float32, "cpu")
    for leaf in leaves(op.spec, values):
        leaf.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        call(op, values).sum().backward()
    assert counter.get_total_flops() == 3 * op.spec.flops(op.spec.check(*values))


def at_an_odd_element(tensor):
    return torch.cat([tensor[:1], tensor])[1:]


@pytest.mark.parametrize(("op", "names"), [(READ, ("kv_norm_bias",)), (WRITE, ("o_bias",))])
def test_cuda_refuses_what_its_kernels_cannot_load(op, names, monkeypatch):
    monkeypatch.setattr(config.extension, "refuses", lambda tensor: None)
    refuses = op.spec.backend("cuda").refuses
    values = list(make_values(op.spec, case_of(op, "three-tiles"), BF16, "cpu"))
    assert refuses(*values) is None
    for name in names:
        moved = values[2]._replace(**{name: at_an_odd_element(getattr(values[2], name))})
        assert f"{name} does not start at a multiple of 16 bytes" in refuses(
            *values[:2], moved, *values[3:]
        )
    others = values[2]._replace(q_bias=at_an_odd_element(values[2].q_bias))
    assert refuses(*values[:2], others, *values[3:]) is None
    patches = list(op.spec.inputs).index("patches")
    strided = [*values]
    strided[patches] = values[patches].transpose(2, 3).contiguous().transpose(2, 3)
    assert "it must be contiguous" in refuses(*strided)


def test_kernels_refuse_to_read_nothing(monkeypatch):
    monkeypatch.setattr(config.extension, "refuses", lambda tensor: None)
    values = list(make_values(READ.spec, case_of(READ, "three-tiles"), BF16, "cpu"))
    values[1] = values[1][:, :, :0]
    assert "a group has 0 patches" in READ.spec.backend("cuda").refuses(*values)
    assert READ.spec.backend("triton").refuses(*values) == "a group has no patches"
    read = call(READ, tuple(values))
    assert torch.equal(read, call(READ, tuple(values), "reference"))
