"""patchify and unpatchify: order, inverse, gradients, bad input."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.utils._python_dispatch

from snapkernels import patchify, unpatchify

BACKENDS = ["reference", "eager", "cpu"]
# One non-square, several groups along each axis, channels that are neither 1 nor 3.
GROUP, SIZE, CHANNELS, PATCH = (2, 3, 2), (4, 12, 12), 5, 2


def video(dtype=torch.float64, batch=2):
    shape = (batch, CHANNELS, *SIZE)
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_element_order_is_the_documented_one(backend):
    tokens = patchify(video(), patch=PATCH, group=GROUP, backend=backend)
    assert tokens.shape == (2, 2 * 2 * 3, 12, CHANNELS * 4)
    assert tokens.is_contiguous()
    for b, g, n, f in [(0, 0, 0, 0), (1, 7, 5, 13), (1, 11, 11, 19), (0, 4, 9, 6), (1, 2, 1, 3)]:
        gt, gh, gw = g // 6, g // 3 % 2, g % 3
        nt, nh, nw = n // 6, n // 2 % 3, n % 2
        c, i, j = f // 4, f // 2 % 2, f % 2
        t, y, x = 2 * gt + nt, 2 * (3 * gh + nh) + i, 2 * (2 * gw + nw) + j
        assert tokens[b, g, n, f] == video()[b, c, t, y, x]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_backends_agree_bitwise_and_invert(dtype, rng):
    x = torch.randn(2, CHANNELS, *SIZE, generator=rng).to(dtype)
    permuted = x.transpose(0, 4).contiguous().transpose(0, 4)
    with pytest.raises(ValueError, match="backend='cpu' cannot run this call: strides"):
        patchify(permuted, patch=PATCH, group=GROUP, backend="cpu")
    for strided, backends in ((x, BACKENDS), (permuted, ["reference", "eager", None])):
        tokens = [patchify(strided, patch=PATCH, group=GROUP, backend=b) for b in backends]
        assert all(torch.equal(tokens[0], other) for other in tokens[1:])
        for backend in BACKENDS:
            back = unpatchify(tokens[0], size=SIZE, patch=PATCH, group=GROUP, backend=backend)
            assert torch.equal(back, strided)
            assert back.is_contiguous()


def test_patches_have_the_order_of_a_convolution_weight(rng):
    x, weight = torch.randn(1, 3, 1, 8, 8, generator=rng), torch.randn(7, 3, 4, 4, generator=rng)
    tokens = patchify(x, group=(1, 2, 2))[0, 0] @ weight.flatten(1).T
    convolved = torch.nn.functional.conv2d(x[:, :, 0], weight, stride=4)[0].flatten(1).T
    torch.testing.assert_close(tokens, convolved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_non_finite_values_pass_through(backend):
    x = video().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: patchify(v, patch=PATCH, group=GROUP, backend=backend), x[:1, :1]
    )
    tokens = patchify(x, patch=PATCH, group=GROUP, backend=backend).detach().requires_grad_()
    weight = torch.randn_like(x)
    back = unpatchify(tokens, size=SIZE, patch=PATCH, group=GROUP, backend=backend)
    (back * weight).sum().backward()
    assert torch.equal(tokens.grad, patchify(weight, patch=PATCH, group=GROUP, backend=backend))
    odd = video().float()
    odd[0, 0, 0, 0, 0], odd[1, 4, 3, 11, 11] = float("nan"), float("inf")
    out = patchify(odd, patch=PATCH, group=GROUP, backend=backend)
    assert out[0, 0, 0, 0].isnan() and out[1, -1, -1, -1].isinf()
    assert (~out.isfinite()).sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    tokens = patchify(video(batch=0), patch=PATCH, group=GROUP, backend=backend)
    assert tokens.shape == (0, 12, 12, CHANNELS * 4)
    back = unpatchify(tokens, size=SIZE, patch=PATCH, group=GROUP, backend=backend)
    assert back.shape == (0, CHANNELS, *SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.zeros(3, 4, 12, 12)}, "video must have 5 dimensions"),
        ({"video": torch.zeros(1, 3, 4, 12, 12, dtype=torch.uint8)}, "floating point, got torch.u"),
        ({"video": [[0.0]]}, "video must be a tensor, got list"),
        ({"patch": 5}, r"H = 12 is not divisible by patch \* group\[1\] = 5 \* 3 = 15"),
        ({"patch": 0}, "patch must be a positive int, got 0"),
        ({"patch": 2.0}, "patch must be a positive int, got 2.0"),
        ({"group": (3, 3, 2)}, r"T = 4 is not divisible by group\[0\] = 3"),
        ({"group": (2, 4, 2)}, r"H = 12 is not divisible by patch \* group\[1\] = 2 \* 4 = 8"),
        ({"group": (2, 3, 5)}, r"W = 12 is not divisible by patch \* group\[2\] = 2 \* 5 = 10"),
        ({"group": (2, 3)}, "group must be three positive ints"),
        ({"group": 4}, "group must be three positive ints"),
        ({"group": (2, 3, 0)}, "group must be three positive ints"),
        ({"backend": 3}, "backend=3 is not one of 'cuda'"),
        ({"backend": ["eager"]}, "is not one of 'cuda'"),
        (
            {"backend": "cudnn"},
            "backend='cudnn' is not one of 'cuda', 'triton', 'cpu', 'eager', 'reference'",
        ),
    ],
)
def test_patchify_names_what_is_wrong(change, message):
    arguments = {"video": video(), "patch": PATCH, "group": GROUP} | change
    with pytest.raises(ValueError, match=f"^patchify: .*{message}"):
        patchify(arguments.pop("video"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 12, 20)}, "tokens must have 4 dimensions"),
        (
            {"tokens": torch.zeros(2, 12, 12, 18)},
            r"P = 18 is not divisible by patch \* patch = 2 \* 2 = 4",
        ),
        (
            {"tokens": torch.zeros(2, 12, 11, 20)},
            r"tokens has N = 11, but N = group\[0\] \* group\[1\] \* group\[2\] = 12",
        ),
        ({"size": (4, 12, 24)}, r"tokens has G = 12, but G = T \* H \* W / .* = 24"),
        ({"size": (4, 12)}, "size must be three positive ints"),
    ],
)
def test_unpatchify_names_what_is_wrong(change, message):
    arguments = {"tokens": torch.zeros(2, 12, 12, 20), "size": SIZE} | change
    with pytest.raises(ValueError, match=f"^unpatchify: .*{message}"):
        unpatchify(arguments.pop("tokens"), patch=PATCH, group=GROUP, **arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_pytorch_cannot_differentiate_is_an_error_and_not_zero():
    def total(x):
        return patchify(x, patch=PATCH, group=GROUP).sum()

    with pytest.raises(NotImplementedError, match="patchify has no forward-mode derivative"):
        torch.func.jvp(total, (video(),), (video(),))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(total)(video())
    videos = video()[None].requires_grad_()
    batched = torch.vmap(lambda x: patchify(x, patch=PATCH, group=GROUP))(videos)
    assert torch.equal(batched[0], patchify(video(), patch=PATCH, group=GROUP))
    assert torch.autograd.grad(batched.sum(), videos)[0].eq(1).all()


def test_export_with_a_dynamic_number_of_frames():
    class Round(torch.nn.Module):
        def forward(self, x):
            tokens = patchify(x, patch=2, group=(1, 2, 2))
            return unpatchify(tokens, size=tuple(x.shape[2:]), patch=2, group=(1, 2, 2))

    example = torch.randn(1, 3, 4, 8, 16)
    frames = {"x": {2: torch.export.Dim("frames", min=2, max=64)}}
    program = torch.export.export(Round(), (example,), dynamic_shapes=frames)
    longer = torch.randn(1, 3, 7, 8, 16)
    assert torch.equal(program.module()(longer), longer)


def test_nothing_in_nothing_out_whatever_is_empty():
    for shape in ((0, 3, 2, 8, 8), (2, 0, 2, 8, 8)):
        empty = torch.empty(shape)
        for strided in (empty, empty.permute(0, 1, 2, 4, 3)):
            assert patchify(strided, patch=2, group=(1, 2, 2)).numel() == 0


def test_the_memory_of_checked_calls_is_bounded_and_tells_shapes_apart():
    for frames in range(1, 300):
        patchify(torch.zeros(1, 1, frames, 2, 2), patch=2, group=(1, 1, 1))
    with pytest.raises(ValueError, match=r"T = 299 is not divisible by group\[0\] = 2"):
        patchify(torch.zeros(1, 1, 299, 2, 2), patch=2, group=(2, 1, 1))
    with pytest.raises(ValueError, match="floating point"):
        patchify(torch.zeros(1, 1, 299, 2, 2, dtype=torch.int32), patch=2, group=(1, 1, 1))


@pytest.mark.filterwarnings("ignore")
def test_whoever_looks_on_sees_one_op():
    """A dispatch mode, the profiler and a graph see the op and not what its backend does."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = video()
    with Watch():
        patchify(x, patch=PATCH, group=GROUP)
    assert seen[0] == "snapkernels.patchify.default"
    with torch.profiler.profile() as profile:
        patchify(x, patch=PATCH, group=GROUP)
    assert "snapkernels::patchify" in {event.key for event in profile.key_averages()}
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda v: patchify(v, patch=PATCH, group=GROUP)
    )(x)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["snapkernels.patchify.default"]
    traced = torch.jit.trace(lambda v: patchify(v, patch=PATCH, group=GROUP), x)
    assert "snapkernels::patchify" in str(traced.graph)
