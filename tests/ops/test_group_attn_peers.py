"""What is timed beside group_read and group_write computes the same, or says why it cannot."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from snapkernels.ops.group_attn import peers
from snapkernels.registry import OPS, Op
from snapkernels.testing.bench import beside
from snapkernels.testing.cases import leaves, make_values

READ, WRITE = OPS["group_read"], OPS["group_write"]
NAMES = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "flash-attn"]
ELSEWHERE = "RuntimeError: No "  # viable backend, or available kernel


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Compilation takes longer than all else here, and is PyTorch's to prove. A GPU is hidden."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("op", [READ, WRITE], ids=lambda op: op.spec.name)
def test_the_layer_is_the_same_around_every_core(op, direction):
    case = next(case for case in op.spec.cases if case.name == "odd")
    sets = [make_values(op.spec, case, torch.float32, "cpu")]
    variants = beside(op, case, direction, torch.float32, sets)
    found = {variant.name: variant for variant in variants}
    assert list(found) == ["compile", *NAMES]
    assert {name for name, variant in found.items() if variant.peer} == set(NAMES)
    here = ["compile", "sdpa-flash", "flex"]
    if direction == "fwd_bwd":
        no_backward = found[here.pop()]
        assert no_backward.gate.startswith("NotImplementedError: FlexAttention does not support")
    for name in here:
        assert found[name].gate == "ok", name
        (one,) = found[name].calls
        if direction == "fwd":
            assert torch.allclose(one(), op.spec.reference(*sets[0]), atol=1e-5)
        else:
            shapes = [leaf.shape for leaf in leaves(op.spec, sets[0])]
            assert [grad.shape for grad in one()] == shapes
        assert found[name].saved_gib is None  # that is measured on a GPU
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


def test_a_peer_whose_gradients_are_wrong_is_not_timed():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.2 * grad

    def wrong(*values):
        return Wrong.apply(READ.spec.backend("eager").run(*values))

    case = next(case for case in READ.spec.cases if case.name == "odd")
    sets = [make_values(READ.spec, case, torch.float32, "cpu")]
    op = Op(replace(READ.spec, peers={"wrong": wrong}, compiled_beside=False), READ.function)
    (values,) = beside(op, case, "fwd", torch.float32, sets)
    (gradients,) = beside(op, case, "fwd_bwd", torch.float32, sets)
    assert values.gate == "ok" and len(values.calls) == 1
    assert gradients.gate.startswith("WrongError: (gradient, ") and not gradients.calls
