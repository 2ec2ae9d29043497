"""group_read and group_write at the upsampler's shape: hard inputs, repeats, large offsets."""

from functools import partial

import pytest
import torch

from snapkernels.dispatch import backward_of, choose, implementation, saving
from snapkernels.registry import OPS
from snapkernels.testing.cases import make_values
from snapkernels.testing.contract import needed
from snapkernels.testing.memory import kept_bytes
from snapkernels.testing.numerics import relative_rms, widened

pytestmark = pytest.mark.gpu
READ, WRITE = OPS["group_read"].spec, OPS["group_write"].spec
BACKENDS = ["cuda", "triton"]


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def upsampler(spec, batch=1, groups=32):
    """The values of a call, by name."""
    case = next(case for case in spec.cases if case.name == "up")
    small = type(case)(
        name="up",
        tier="paper",
        sizes=dict(case.sizes) | {"B": batch, "G": groups},
        options=case.options,
        dtypes=case.dtypes,
    )
    values = make_values(spec, small, torch.bfloat16, "cuda")
    return dict(zip((*spec.inputs, *spec.options), values, strict=True))


def run(spec, backend, call):
    return implementation(choose(spec, backend, tuple(call.values())))(*call.values())


def branch_error(spec, result, call):
    exact = spec.reference(*widened(tuple(call.values())))
    residual = call[spec.residual].double()
    return relative_rms(result.double() - residual, exact - residual)


def far_from_zero(call, spec):
    """Patches with a mean of ten standard deviations."""
    return call | {"patches": call["patches"] + 10}


def peaked(call, spec):
    """Scores eight times as large: one token takes nearly all."""
    return call | {"weights": call["weights"]._replace(q_weight=8 * call["weights"].q_weight)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
@pytest.mark.parametrize("change", [far_from_zero, peaked], ids=lambda change: change.__name__)
def test_hard_inputs_are_no_less_exact_than_eager(change, spec, backend, gpu):
    call = change(upsampler(spec, groups=3), spec)
    errors = [branch_error(spec, run(spec, name, call), call) for name in (backend, "eager")]
    assert errors[0] <= errors[1], errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_thousand_repeats_are_equal_in_every_bit(spec, backend, gpu):
    call = upsampler(spec)
    first = run(spec, backend, call)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differ += (run(spec, backend, call).view(torch.int16) != first.view(torch.int16)).any()
    assert differ == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_offsets_past_two_to_the_31(spec, backend, gpu):
    """Of sixteen videos, 2.4 G elements, the last comes out as it does alone."""
    call = upsampler(spec, batch=16)
    last = run(spec, backend, call)[-1:]
    alone = {
        name: value[-1:] if isinstance(value, torch.Tensor) and value.dim() == 4 else value
        for name, value in call.items()
    }
    assert torch.equal(last, run(spec, backend, alone))


def gradients(spec, backend, call):
    """Those of every input, for a gradient of the output that is the first input."""
    values = tuple(call.values())
    _, *saved = saving(spec.backend(backend))(*values)
    needs = needed(spec, values)
    return backward_of(spec.backend(backend))(needs, values[0], *saved, *values)


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_thousand_backwards_are_equal_in_every_bit(spec, gpu):
    call = upsampler(spec)
    first = gradients(spec, "cuda", call)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for one, other in zip(gradients(spec, "cuda", call), first, strict=True):
            differ += (one.view(torch.int16) != other.view(torch.int16)).any()
    assert differ == 0


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_gradient_may_start_anywhere(spec, gpu):
    call = upsampler(spec, groups=2)
    values = tuple(call.values())
    _, *saved = saving(spec.backend("cuda"))(*values)
    backward, needs = backward_of(spec.backend("cuda")), needed(spec, values)
    grad = torch.randn_like(values[0])
    odd = torch.empty(grad.numel() + 1, dtype=grad.dtype, device="cuda")[1:].view(grad.shape)
    odd.copy_(grad)
    assert odd.data_ptr() % 16
    expected, found = (backward(needs, one, *saved, *values) for one in (grad, odd))
    for one, other in zip(found, expected, strict=True):  # cuBLAS goes by the address
        assert torch.equal(one, other) or relative_rms(one, other) < 2**-7


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_token_that_is_not_a_number_is_in_the_gradients(spec, gpu):
    call = upsampler(spec, groups=2)
    call["patches"][0, 1, 4000, 7] = float("nan")
    grads = dict(zip(list(spec.inputs)[:2], gradients(spec, "cuda", call), strict=False))
    assert grads["patches"][0, 0].isfinite().all() and grads["patches"][0, 1, 4000].isnan().all()
    assert grads["latents"][0, 0].isfinite().all() and grads["latents"][0, 1].isnan().any()


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_backward_is_captured_in_a_cuda_graph(spec, gpu):
    call = upsampler(spec, groups=4)
    expected = gradients(spec, "cuda", call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(spec, "cuda", call)
    for one in found:
        one.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("spec", "most_gib"), [(READ, 0.05), (WRITE, 0.15)])
def test_what_a_forward_keeps_for_its_backward(spec, most_gib, gpu):
    call = upsampler(spec)
    function = OPS[spec.name].function
    for one in call["weights"]:
        one.requires_grad_()
    with torch.enable_grad():
        assert function(**call).requires_grad
        kept = kept_bytes(partial(function, **call))
    assert 0 < kept <= most_gib * 2**30, kept / 2**30


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_the_gradient_of_the_patches_past_two_to_the_31(spec, gpu):
    """Of sixteen videos, 2.4 G elements, the last comes out as it does alone."""
    call = upsampler(spec, batch=16)
    patches = list(spec.inputs).index("patches")
    last = gradients(spec, "cuda", call)[patches][-1:].clone()
    alone = {
        name: value[-1:] if isinstance(value, torch.Tensor) and value.dim() == 4 else value
        for name, value in call.items()
    }
    assert torch.equal(last, gradients(spec, "cuda", alone)[patches])


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_a_token_that_is_not_a_number_is_seen(spec, gpu):
    call = upsampler(spec, groups=2)
    call["patches"][0, 1, 4000, 7] = float("nan")
    result = run(spec, "cuda", call)
    assert result[0, 0].isfinite().all()
    if spec is READ:
        assert result[0, 1].isnan().all()
    else:
        assert result[0, 1, 4000].isnan().all() and result[0, 1].isnan().sum() == 1024


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_strided_weights_are_as_good(spec, gpu):
    call = upsampler(spec, groups=2)
    strided = call["weights"]._replace(
        **{
            name: torch.stack([one, one], -1)[..., 0]
            for name, one in call["weights"]._asdict().items()
        }
    )
    assert not strided.o_bias.is_contiguous()
    assert torch.equal(run(spec, "cuda", call), run(spec, "cuda", call | {"weights": strided}))


@pytest.mark.parametrize("spec", [READ, WRITE], ids=lambda spec: spec.name)
def test_the_upsampler_runs_on_cuda_and_the_first_stage_does_not(spec, gpu):
    for case in spec.cases:
        if case.tier != "paper":
            continue
        values = make_values(spec, case, torch.bfloat16, "meta")
        on = [torch.empty_like(one, device="cuda") for one in values[:2]]
        weights = type(values[2])(*(torch.empty_like(one, device="cuda") for one in values[2]))
        for tracked in (False, True):
            chosen = choose(spec, None, (*on, weights, *values[3:]), tracked=tracked).name
            assert chosen == ("cuda" if case.name == "up" else "eager"), case.name
