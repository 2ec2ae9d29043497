"""The exact probes: where their markers are, and which bugs they see by themselves."""

import pytest
import torch

from snapkernels.dispatch import implementation
from snapkernels.registry import OPS
from snapkernels.spec import Mutant
from snapkernels.testing.cases import make_values
from snapkernels.testing.mutants import planted
from snapkernels.testing.probes import borders, marked, missed
from snapkernels.testing.proofs import LIMITS

PROBED = [op.spec for op in OPS.values() if op.spec.probe]


def case(spec, name):
    return next(one for one in spec.cases if one.name == name)


def lost(spec, name, run, dtype):
    values = make_values(spec, case(spec, name), dtype, "cpu")
    return missed(spec, spec.probe, values, run, LIMITS[dtype])


def test_markers_stand_where_tiles_meet():
    assert borders(1) == [0] and borders(5) == [0, 4]
    assert borders(129) == [0, 15, 16, 31, 32, 63, 64, 127, 128]
    assert borders(128)[-2:] == [64, 127]


def test_every_op_that_reads_by_a_softmax_has_a_probe():
    assert {spec.name for spec in PROBED} == {"group_read", "group_write", "latent_attention"}


@pytest.mark.parametrize("spec", PROBED, ids=lambda spec: spec.name)
def test_all_is_zero_but_the_marker(spec):
    values = make_values(spec, case(spec, "odd"), torch.float32, "cpu")
    call = dict(
        zip((*spec.inputs, *spec.options), marked(spec, spec.probe, values, 1), strict=True)
    )
    before = dict(zip(call, values, strict=True))
    tokens = call[spec.probe.tokens]
    assert torch.equal(tokens[..., 1, :], before[spec.probe.tokens][..., 1, :])
    assert tokens.count_nonzero() == tokens[..., 1, :].count_nonzero()
    assert call["weights"].v_weight is before["weights"].v_weight
    assert not call["weights"].q_weight.any() and before["weights"].q_weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", PROBED, ids=lambda spec: spec.name)
def test_right_backends_find_every_marker(spec, dtype):
    values = make_values(spec, case(spec, "ragged"), dtype, "cpu")
    for backend in (one for one in spec.backends if one.refuses(*values) is None):
        assert lost(spec, "ragged", implementation(backend), dtype) == []


BUGS = [
    ("group_read", "ragged", "first key of each group dropped"),
    ("group_write", "ragged", "first key of each group dropped"),
    ("latent_attention", "ragged", "first key dropped"),
    ("group_read", "odd", "groups and videos swapped"),
    ("group_read", "masked", "mask ignored"),
    ("group_read", "masked", "group with nothing to read reads all"),
    ("group_write", "odd", "values one row early, the first from the group before"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "name", "bug"), BUGS)
def test_they_see_what_reads_the_wrong_tokens(op, name, bug, dtype):
    spec = OPS[op].spec
    mutant = next(one for one in spec.mutants if one.name == bug)
    with planted(spec, mutant) as backend:
        assert lost(spec, name, implementation(backend), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_they_see_padding_in_the_denominator_and_one_lost_token_of_many(dtype):
    """The case "ragged" has 129 patches: two tiles of 128, the second with one patch."""
    spec = OPS["group_read"].spec
    eager = "attn_mask = readable = None"
    for position in (0, 64, 128):
        mutant = Mutant(
            name="one",
            backend="eager",
            find=eager,
            replace=f"""attn_mask, readable = torch.arange(
        k_BGKI.shape[2], device=k_BGKI.device
    )[None] != {position}, None""",
        )
        with planted(spec, mutant) as backend:
            assert position in lost(spec, "ragged", implementation(backend), dtype)
    padded = Mutant(
        name="padded",
        backend="eager",
        find="return linear(",
        replace="context_BGQI = context_BGQI * (129 / 256)\n    return linear(",
    )
    with planted(spec, padded) as backend:
        assert lost(spec, "ragged", implementation(backend), dtype) == borders(129)
