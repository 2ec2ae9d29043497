"""Which of a backend's functions a call runs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from snapkernels import env
from snapkernels.dispatch import explain
from snapkernels.library import define
from snapkernels.spec import Backend, Spec, Tensor


def cube_spec(name, *kernels):
    """An op x^3 with the backends `kernels` and the equation."""
    equation = Backend(name="reference", run=lambda x: x**3)
    return Spec(
        name=name,
        kind="op",
        math="x^3",
        legend={"N": "numbers", "E": "of each that are kept"},
        inputs={"x": Tensor("N")},
        options={},
        rules=("E = 2",),
        output=Tensor("N"),
        saved={"powers": Tensor("N E", dtype=torch.float32)},
        backends=(*kernels, equation),
        reference=equation.run,
        cases=(),
    )


def cubes(name, *kernels):
    """The op of `cube_spec`, registered."""
    return define(cube_spec(name, *kernels))


@pytest.fixture
def ran():
    return []


@pytest.fixture
def functions(ran):
    """A forward, the same with what it keeps, and a backward that needs that."""

    def run(x):
        ran.append("run")
        return x**3

    def saving(x):
        ran.append("saving")
        return x**3, torch.stack([x, x**2], -1)

    def backward(needs, grad, powers, x):
        ran.append("backward")
        assert needs == (True,) and powers.shape == (*x.shape, 2)
        return (3 * grad * powers[:, 1],)

    return {"run": run, "saving": saving, "backward": backward}


def test_what_a_backward_needs_is_saved_for_a_gradient_only(ran, functions):
    cube = cubes("cube_in_two_ways", Backend(name="kernel", **functions))
    x = torch.tensor([1.0, 2.0])
    assert cube(x, None).tolist() == [1, 8] and ran == ["run"]
    x.requires_grad_()
    with torch.no_grad():
        cube(x, None)
    assert ran == ["run", "run"]
    (grad,) = torch.autograd.grad(cube(x, None).sum(), x)
    assert grad.tolist() == [3, 12] and ran[2:] == ["saving", "backward"]


def test_a_backend_with_one_forward_saves_in_it(ran, functions):
    cube = cubes(
        "cube_in_one_way",
        Backend(name="kernel", run=functions["saving"], backward=functions["backward"]),
    )
    x = torch.tensor([1.0, 2.0])
    assert cube(x, None).tolist() == [1, 8]
    (grad,) = torch.autograd.grad(cube(x.requires_grad_(), None).sum(), x)
    assert grad.tolist() == [3, 12] and ran == ["saving", "saving", "backward"]


def test_pytorch_differentiates_a_backend_without_a_backward(ran, functions):
    cube = cubes("cube_of_calls", Backend(name="kernel", **functions))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(cube(x, "reference").sum(), x)
    assert grad.tolist() == [3, 12] and ran == []


@pytest.fixture
def forward_only(ran):
    def run(x):
        ran.append("forward only")
        return x**3

    return Backend(name="fast", run=run, differentiable=False)


def test_what_is_differentiated_runs_a_backend_that_can_be(ran, functions, forward_only):
    cube = cubes("cube_forward_only", forward_only, Backend(name="kernel", **functions))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with torch.no_grad():
        assert cube(x, None).tolist() == cube(x, "fast").tolist() == [1, 8]
    assert ran == ["forward only"] * 2
    (grad,) = torch.autograd.grad(cube(x, None).sum(), x)
    assert grad.tolist() == [3, 12] and ran[2:] == ["saving", "backward"]


def test_a_backend_without_a_backward_that_is_named_says_so(ran, forward_only, monkeypatch):
    cube = cubes("cube_named", forward_only)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    message = "cube_named: backend='fast' has no backward yet"
    with pytest.raises(NotImplementedError, match=message):
        cube(x, "fast")
    with FlopCounterMode(display=False), pytest.raises(NotImplementedError, match=message):
        cube(x, "fast")
    unchecked, _ = torch.ops.snapkernels.cube_named(x, "fast")
    with pytest.raises(NotImplementedError, match=message):
        unchecked.sum().backward()
    monkeypatch.setitem(env.BACKENDS, "cube_named", "fast")
    with pytest.raises(NotImplementedError, match=message):
        cube(x, None)


@pytest.mark.parametrize("with_backward", [True, False])
def test_a_traced_call_is_computed_again_for_its_gradient(
    ran, functions, forward_only, with_backward
):
    """What was kept of a forward without a backward is not what the other's backward needs.

    Where PyTorch differentiates all that can be, it sees the calls.
    """
    kernel = (Backend(name="kernel", **functions),) if with_backward else ()
    cube = cubes(f"cube_traced_{with_backward}", forward_only, *kernel)
    compiled = torch.compile(lambda x: cube(x, None), fullgraph=True, backend="aot_eager")
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert grad.tolist() == [3, 12]
    assert ran == with_backward * ["forward only", "saving", "backward"]


@pytest.mark.parametrize("backend", [None, "kernel"])
def test_a_traced_call_keeps_what_the_spec_says_or_what_is_named_needs(ran, functions, backend):
    spec = replace(
        cube_spec(f"cube_kept_{backend}", Backend(name="kernel", **functions)),
        keeps=lambda sizes: sizes["N"] > 2,
    )
    cube = define(spec)
    compiled = torch.compile(lambda x: cube(x, backend), fullgraph=True, backend="aot_eager")
    for count in (2, 3):
        x = torch.ones(count, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert grad.tolist() == count * [3]
    kept = ["saving", "backward"]
    assert ran == (kept if backend else ["run", *kept]) + kept


def test_explain_says_what_trains(functions, forward_only):
    kernel = Backend(name="kernel", **functions)
    spec = cube_spec("cube_explained", forward_only, kernel)
    lines = explain(spec, torch.ones(2)).splitlines()
    assert lines[2:] == [
        "  fast       runs; has no backward yet",
        "  kernel     can, but fast is preferred; runs what is to be differentiated",
        "  reference  can, but fast is preferred",
    ]
