"""What is timed beside the fp8 ops computes the same, or says why it cannot."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from snapkernels.ops.feed_forward import peers
from snapkernels.registry import OPS
from snapkernels.testing.bench import beside
from snapkernels.testing.cases import make_values

LINEAR, FEED_FORWARD = OPS["linear_fp8"], OPS["feed_forward_fp8"]
NAMES = ["torchao", "transformer-engine"]
each_op = pytest.mark.parametrize("op", [LINEAR, FEED_FORWARD], ids=lambda op: op.spec.name)


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Compilation takes longer than all else here, and is PyTorch's to prove. A GPU is hidden."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "compiled", lambda layer: layer)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


@pytest.fixture
def stand_in(monkeypatch):
    """A torchao that keeps a matrix as it is, or leaves it; returns those it was given."""
    given = []

    class Rows(torch.Tensor):
        """A matrix that is no plain parameter."""

    def quantize_(layer, config):
        given.append(layer.weight.detach().clone())
        assert config == {"granularity": "a row", "set_inductor_config": False}
        assert layer.weight.shape == (layer.out_features, layer.in_features)
        if layer.in_features % 16 == 0:
            layer.weight = nn.Parameter(layer.weight.as_subclass(Rows), requires_grad=False)

    package, module = ModuleType("torchao"), ModuleType("torchao.quantization")
    module.Float8DynamicActivationFloat8WeightConfig = lambda **how: how
    module.PerRow = lambda: "a row"
    module.quantize_ = quantize_
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    return given


def found_beside(op, name, sets=1):
    case = next(case for case in op.spec.cases if case.name == name)
    dtype = case.dtypes[0]
    drawn = [make_values(op.spec, case, dtype, "cpu", seed=seed) for seed in range(sets)]
    return {variant.name: variant for variant in beside(op, case, "fwd", dtype, drawn)}, drawn


@each_op
def test_the_layer_has_the_matrices_of_torchao_made_once_a_set(op, stand_in):
    found, sets = found_beside(op, "tiles", sets=2)
    assert list(found) == ["compile", *NAMES]
    assert {name for name, variant in found.items() if variant.peer} == set(NAMES)
    assert [found[name].gate for name in ("compile", "torchao")] == ["ok", "ok"]
    matrices = 1 if op is LINEAR else 2
    assert len(stand_in) == matrices  # the gate has run the first set
    results = [one() for one in found["torchao"].calls * 2]
    assert len(stand_in) == 2 * matrices
    for values, result in zip(sets * 2, results, strict=True):
        expected = op.spec.reference(*values)
        assert torch.allclose(result, expected, atol=0.1) and result.dtype == torch.bfloat16
    assert not torch.equal(results[0], results[1])
    weight, scale = sets[0][1:3] if op is LINEAR else sets[0][1][2:4]
    whole = weight.double() * scale.double()[:, None]
    torch.testing.assert_close(stand_in[0].double(), whole, rtol=2**-8, atol=0)


@each_op
def test_a_matrix_that_torchao_leaves_is_not_timed_as_fp8(op, stand_in):
    found, _ = found_beside(op, "outliers")
    assert found["torchao"].gate.startswith("NotImplementedError: torchao leaves a matrix of (")
    assert not found["torchao"].calls


@each_op
def test_transformer_engine_is_listed_with_the_reason(op):
    found, _ = found_beside(op, "odd")
    gate = found["transformer-engine"].gate
    assert gate.startswith("NotImplementedError: Transformer Engine is absent: ")
    assert "no wheel" in gate and not found["transformer-engine"].calls


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="it is here")
@each_op
def test_a_package_that_is_absent_is_named(op):
    found, _ = found_beside(op, "tiles")
    assert found["torchao"].gate == "ImportError: torchao is absent: No module named 'torchao'"


@each_op
def test_torchao_itself_is_within_the_limits_of_eager(op, monkeypatch):
    """Where it is installed: it multiplies on a CPU, but would not be asked to."""
    api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(api, "_check_hardware_support", lambda granularity: None)
    found, _ = found_beside(op, "tiles")
    assert found["torchao"].gate == "ok"
