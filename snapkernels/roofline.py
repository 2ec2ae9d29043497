"""The ceilings of a device, measured on the spot: how fast it copies and multiplies."""

import torch

from snapkernels.testing.timing import measure

# Large enough to leave the caches (copy) and to fill the chip (matrix product); a CPU is given
# about a second of work.
GPU_COPY_BYTES, GPU_GEMM = 1 << 30, 8192
CPU_COPY_BYTES, CPU_GEMM = 1 << 27, 1536


def measure_ceilings(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, repeats: int = 20
) -> dict[str, float]:
    """Measure copy bandwidth and matrix product rates on random data; medians of `repeats`.

    Returns:
        "copy_tb_s" (bytes read plus bytes written, TB/s), "<dtype>_tflop_s" for `dtype` ("bf16",
        "fp16", "fp32", "fp64"), and "fp8_tflop_s" (e4m3, tensor scale, fast accumulation) where the
        device has fp8 matrix units.

    Raises:
        ValueError: a dtype without a short name.
    """
    on_gpu = device.type == "cuda"
    size = GPU_GEMM if on_gpu else CPU_GEMM
    ceilings = {
        "copy_tb_s": _copy_tb_s(device, GPU_COPY_BYTES if on_gpu else CPU_COPY_BYTES, repeats),
        f"{short_name(dtype)}_tflop_s": _gemm_tflop_s(device, dtype, size, repeats),
    }
    if on_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        ceilings["fp8_tflop_s"] = _fp8_gemm_tflop_s(device, size, repeats)
    return ceilings


def short_name(dtype: torch.dtype) -> str:
    """ "bf16" for torch.bfloat16, and so on.

    Raises:
        ValueError: a dtype without a short name.
    """
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.float64: "fp64",
    }
    if dtype not in names:
        raise ValueError(f"dtype must be one of {', '.join(map(str, names))}, got {dtype}")
    return names[dtype]


def _copy_tb_s(device: torch.device, size: int, repeats: int) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = measure(lambda: target.copy_(source), device, repeats=repeats).median
    return 2 * size / ms / 1e9


def _gemm_tflop_s(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms = measure(lambda: torch.mm(a, b, out=out), device, repeats=repeats).median
    return 2 * size**3 / ms / 1e9


def _fp8_gemm_tflop_s(device: torch.device, size: int, repeats: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * size**3 / measure(product, device, repeats=repeats).median / 1e9
