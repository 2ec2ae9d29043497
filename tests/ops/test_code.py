"""Triton's kernels compiled ahead of time: every proof of machine code, a family's in one go."""

from dataclasses import replace

import pytest
import torch

from snapkernels.registry import OPS
from snapkernels.testing import proofs

PROOFS = [proof for proof in proofs.proofs() if proof.of_code]


@pytest.mark.parametrize("proof", [pytest.param(proof, id=proof.id) for proof in PROOFS])
def test_it_holds(proof):
    proof.run()


def test_a_spec_holds_its_kernels_to_its_registers():
    spec = OPS["patchify"].spec
    case = next(case for case in spec.cases if case.name == "stage1-frames")
    proofs.machine_code(spec, case, torch.bfloat16, "sm_90")
    few = replace(spec, most_registers=17)
    with pytest.raises(AssertionError, match=r"patchify_kernel has \d+ registers, more than 17"):
        proofs.machine_code(few, case, torch.bfloat16, "sm_90")
