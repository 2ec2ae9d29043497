"""Triton's kernels compiled ahead of time: every proof of machine code, a family's in one go."""

from dataclasses import replace

import pytest
import torch

from snapkernels.registry import OPS
from snapkernels.testing import aot, proofs

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


@pytest.mark.parametrize(
    ("target", "e4m3", "int8"), [("sm_90", "QGMMA", "IGMMA"), ("sm_89", "QMMA", "IMMA")]
)
@pytest.mark.parametrize("case", ["3.9b", "500m-b64"])
def test_latent_attention_multiplies_e4m3_in_projections_and_integers_between(
    case, target, e4m3, int8
):
    key = aot.key("latent_attention_fp8", case, torch.bfloat16, target)
    products = [one for one in aot.reports("latent_attn")[key] if one.products]
    assert [one.kernel for one in products] == ["product_kernel", "core_kernel", "product_kernel"]
    for report in products:
        wanted, other = (int8, e4m3) if report.kernel == "core_kernel" else (e4m3, int8)
        assert any(one.startswith(wanted) for one in report.instructions)
        assert not any(one.startswith(other) for one in report.instructions)
