"""What the specs promise: the proofs of `snapkernels.testing.proofs`, seeded bugs included.

Those of machine code are in `tests/ops/test_code.py`, for another worker to run.
"""

import pytest
import torch

from snapkernels import extension
from snapkernels.registry import OPS
from snapkernels.testing.proofs import proofs

PROOFS = [proof for proof in proofs() if not proof.of_code]


def marks(proof):
    """With a GPU, the proofs that use it are its tier, small cases and seeded bugs included."""
    on_gpu = torch.cuda.is_available() and proof.on_gpu
    return [pytest.mark.gpu] if on_gpu or proof.lacks == "an NVIDIA GPU" else []


@pytest.mark.parametrize("proof", [pytest.param(p, id=p.id, marks=marks(p)) for p in PROOFS])
def test_it_holds(proof):
    proof.run()


def test_every_op_has_cases_in_every_tier_and_seeded_bugs():
    for op in OPS.values():
        tiers = {case.tier for case in op.spec.cases}
        assert {"cpu", "paper"} <= tiers, op.spec.name
        assert len(op.spec.mutants) >= 4, op.spec.name


def test_every_seeded_bug_is_among_the_proofs():
    planted = {mutant.name for op in OPS.values() for mutant in op.spec.mutants}
    proved = {proof.id.split(": ", 1)[1] for proof in PROOFS if " mutant " in proof.id}
    assert planted == proved and len(planted) >= 25


def test_every_compiled_bug_is_in_its_source_once():
    """On a machine without a GPU none of them is built."""
    for op in OPS.values():
        for mutant in (one for one in op.spec.mutants if one.file):
            source = (extension.CSRC / mutant.file).read_text()
            assert source.count(mutant.find) == 1, mutant.name


def test_names_are_unique():
    ids = [proof.id for proof in proofs()]
    assert len(set(ids)) == len(ids)
