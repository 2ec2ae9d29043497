"""Which of a backend's functions a call runs."""

import pytest
import torch

from snapkernels.library import define
from snapkernels.spec import Backend, Spec, Tensor


def cubes(name, kernel):
    """An op x^3 with a backend `kernel` and the equation, registered as `name`."""
    equation = Backend(name="reference", run=lambda x: x**3)
    return define(
        Spec(
            name=name,
            kind="op",
            math="x^3",
            legend={"N": "numbers", "E": "of each that are kept"},
            inputs={"x": Tensor("N")},
            options={},
            rules=("E = 2",),
            output=Tensor("N"),
            saved={"powers": Tensor("N E", dtype=torch.float32)},
            backends=(kernel, equation),
            reference=equation.run,
            cases=(),
        )
    )


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
