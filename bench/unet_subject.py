"""A U-Net baseline as the throughput bench times it: eager or compiled, at its best setting."""

from collections.abc import Callable

import torch
from subject import CAPTURED, Options, Variant
from unet import UNet, UNetConfig, unet_reference, unet_tflop
from workload import SEED, Batch, load_batch

from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.timing import measure
from snapvideo_core import SnapDiffusion
from snapvideo_core.capture import recorded

FORWARDS = {"infer": 1, "train": 3}  # no self-conditioning: forward, and a backward of two
INCLUDES = {
    "infer": "one denoiser evaluation, no guidance",
    "train": "forward + backward, no optimiser; the U-Net has no self-conditioning",
}
BACKENDS = ("eager", "compile")
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
TRIAL_REPEATS = 5
# Relative rms error of F against float64. In bf16 the two land at 1.1e-2 and 0.9e-2; the mildest
# seeded bug, a text mask that is ignored, at 3.1e-2.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}


class UNetSubject:
    """One U-Net; see `Subject`. Of the two memory formats it has the faster one.

    Args:
        config: its sizes.
        variant: of the backends "eager" and "compile".
        options: of the run.
        batch: the first that is timed: formats are tried and what is compiled is gated at it.
    """

    def __init__(self, config: UNetConfig, variant: Variant, options: Options, batch: int):
        self.config, self.variant, self.options = config, variant, options
        self.modes: tuple[str, ...] = ("infer", "train")
        self.gate_batch = batch
        torch.manual_seed(SEED)
        with options.device:
            self.module = UNet(config).to(options.dtype)
        self.format = "contiguous"

    def gated(self) -> tuple[str, dict[str, float]]:
        """Choose the format, then hold the output of one video against a float64 copy."""
        model = self.module.eval()
        inputs = self._inputs(self._batch(self.gate_batch))
        self._choose_format(inputs)
        with torch.no_grad():
            x, *others = (one[:1] for one in inputs)
            wide = [one.double() if one.is_floating_point() else one for one in others]
            expected = unet_reference(model)(x.double(), *wide)
            if self.variant.backend == "compile":
                torch.compiler.reset()
                model.compile(dynamic=False)
            error = relative_rms(model(*inputs)[:1], expected)
        limit = LIMITS[self.options.dtype]
        ok = error <= limit
        verdict = "ok" if ok else f"relative rms error {error:.2e} vs float64, limit {limit:.2e}"
        eager = {"rms_eager": error} if self.variant.backend == "eager" else {}
        return verdict, {"rms_vs_fp64": error} | eager

    def inference(self, batch: int) -> Callable[[], object]:
        """One denoiser evaluation: c_in and c_skip scaling, network."""
        data = self._batch(batch)
        model = self.module.eval()
        diffusion = SnapDiffusion(sigma_in=self.config.sigma_in)

        @torch.no_grad()
        def evaluate() -> tuple[torch.Tensor, torch.Tensor]:
            x = diffusion.network_input(data.x_sigma, data.sigma)
            result = model(x, data.sigma, data.cond.text, data.cond.text_mask)
            skip, out = (
                scale(data.sigma)[:, None, None, None, None]
                for scale in (diffusion.c_skip, diffusion.c_out)
            )
            return torch.addcmul(skip * data.x_sigma, out, result), data.sigma

        if not self.options.capture:
            return evaluate
        return recorded(evaluate, self.options.device, self.config.name)[0]

    def training_step(self, batch: int) -> Callable[[], object]:
        """A forward and a backward pass."""
        data = self._batch(batch)
        model = self.module.train()
        diffusion = SnapDiffusion(sigma_in=self.config.sigma_in)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            eps = torch.randn_like(data.video)
            x_sigma = diffusion.noise(data.video, eps, data.sigma)
            x = diffusion.network_input(x_sigma, data.sigma)
            result = model(x, data.sigma, data.cond.text, data.cond.text_mask)
            diffusion.loss(result, data.video, eps, data.sigma).backward()

        return step

    def includes(self, mode: str) -> str:
        captured = self.options.capture and mode == "infer"
        return f"{INCLUDES[mode]}; {self.format}" + CAPTURED * captured

    def tflop(self, mode: str) -> float:
        return unet_tflop(self.config) * FORWARDS[mode]

    def floor_ms(self, mode: str) -> float:
        return self.tflop(mode) / self.options.tflop_s * 1e3

    def _batch(self, videos: int) -> Batch:
        options = self.options
        return load_batch(options.clip, self.config, videos, options.framerate, options.device)

    def _inputs(self, data: Batch) -> tuple[torch.Tensor, ...]:
        diffusion = SnapDiffusion(sigma_in=self.config.sigma_in)
        x = diffusion.network_input(data.x_sigma, data.sigma)
        return x, data.sigma, data.cond.text, data.cond.text_mask

    @torch.no_grad()
    def _choose_format(self, inputs: tuple[torch.Tensor, ...]) -> None:
        times = {}
        for name, memory_format in FORMATS.items():
            model = in_format(self.module, memory_format)
            times[name] = measure(
                lambda model=model: model(*inputs),  # type: ignore[misc]
                self.options.device,
                repeats=TRIAL_REPEATS,
            ).median
        self.format = min(times, key=times.__getitem__)
        in_format(self.module, FORMATS[self.format])


def in_format(model: UNet, memory_format: torch.memory_format) -> UNet:
    """`model` with its weights of four dimensions laid out so, in place."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return model
