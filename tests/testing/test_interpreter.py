"""The correction of Triton's interpreter is in force in this process."""

import pytest
import torch
import triton
import triton.language as tl

from snapkernels import env

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="Triton runs compiled here")


@triton.jit
def cast_kernel(p_in, p_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_in + i, mask=i < n)
    tl.store(p_out + i, x.to(p_out.dtype.element_ty), mask=i < n)


@triton.jit
def product_kernel(p_a, p_b, p_c, M: tl.constexpr):
    i, j = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    a, b = tl.load(p_a + i * M + j), tl.load(p_b + i * M + j)
    tl.store(p_c + i * M + j, tl.dot(a, b))


@pytest.fixture(autouse=True)
def mended():
    """As dispatch does when it loads a Triton backend."""
    from snapkernels import interpreter

    interpreter.install()


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_are_those_of_torch_bit_for_bit(dtype, rng):
    ties = torch.arange(-600, 600, dtype=torch.float32) / 16
    x = torch.cat([torch.randn(2000, generator=rng) * 30, ties, torch.tensor([1e3, -6e4, 1e-9])])
    out = torch.empty(len(x), dtype=dtype)
    cast_kernel[(triton.cdiv(len(x), 512),)](x, out, len(x), 512)
    assert torch.equal(out.view(torch.uint8), x.to(dtype).view(torch.uint8))
    back = torch.empty(len(x))
    cast_kernel[(triton.cdiv(len(x), 512),)](out, back, len(x), 512)
    assert torch.equal(back, out.float())


def test_e4m3_keeps_nan_and_saturates_infinity_as_the_gpu_does():
    """So a kernel has to make NaN of an infinity itself."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 449.0, 464.0, 17.0, 19.0, 2**-10])
    out = torch.empty(len(x), dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x, out, len(x), 8)
    assert out[0].float().isnan()
    assert out[1:].float().tolist() == [448, -448, 448, 448, 16, 20, 0]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_products_of_narrow_operands_accumulate_in_float32(dtype, rng):
    a, b = (torch.randn(32, 32, generator=rng).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    product_kernel[(1,)](a, b, c, 32)
    exact = a.double() @ b.double()
    assert (c - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("package", [tl, tl.core, tl.math, tl.tensor], ids=str)
def test_what_is_patched_is_what_the_shipped_interpreter_patches(package):
    from snapkernels import interpreter

    class Scope(dict):
        def set_attr(self, obj, name, value):
            self[name] = obj

    ours, shipped = Scope(), Scope()
    interpreter._patch_builtin(package, None, ours)
    interpreter._shipped_patch_builtin(package, None, shipped)
    assert ours == shipped and len(interpreter._BUILTINS[package]) > 5
