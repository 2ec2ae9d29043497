"""What is timed beside group_read and group_write computes the same, or says why it cannot."""

import importlib.util

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from snapkernels.ops.group_attn import peers
from snapkernels.registry import OPS
from snapkernels.testing.bench import beside
from snapkernels.testing.cases import make_values

READ, WRITE = OPS["group_read"], OPS["group_write"]
NAMES = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "flash-attn"]
ELSEWHERE = "RuntimeError: No "  # viable backend, or available kernel


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Compilation takes longer than all else here, and is PyTorch's to prove."""
    monkeypatch.setattr(peers, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("op", [READ, WRITE], ids=lambda op: op.spec.name)
def test_the_layer_is_the_same_around_every_core(op):
    case = next(case for case in op.spec.cases if case.name == "odd")
    sets = [make_values(op.spec, case, torch.float32, "cpu")]
    found = {variant.name: variant for variant in beside(op, case, torch.float32, sets)}
    assert list(found) == ["compile", *NAMES]
    assert {name for name, variant in found.items() if variant.peer} == set(NAMES)
    for name in ("compile", "sdpa-flash", "flex"):
        assert found[name].gate == "ok", name
        (one,) = found[name].calls
        assert torch.allclose(one(), op.spec.reference(*sets[0]), atol=1e-5)
    for name in ("sdpa-cudnn", "sdpa-efficient"):  # they are of a GPU
        assert found[name].gate.startswith(ELSEWHERE) and not found[name].calls


@pytest.mark.parametrize("name", ["flex", "flash-attn"])
def test_a_peer_without_a_mask_says_so(name):
    case = next(case for case in READ.spec.cases if case.name == "masked")
    values = make_values(READ.spec, case, torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="is timed without a mask only"):
        READ.spec.peers[name](*values)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is here")
def test_a_package_that_is_absent_is_named():
    case = next(case for case in READ.spec.cases if case.name == "odd")
    values = make_values(READ.spec, case, torch.float32, "cpu")
    with pytest.raises(ImportError, match="flash-attn-4 is absent: No module named 'flash_attn'"):
        READ.spec.peers["flash-attn"](*values)
