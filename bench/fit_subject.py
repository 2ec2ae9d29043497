"""A FIT as the throughput bench times it: ours, eager, compiled, or by what others offer."""

from collections.abc import Callable

import torch
from gate import (
    LIMITS,
    QUANTISED_LIMIT,
    QUANTISED_RATIO,
    Inputs,
    expected_output,
    gate_videos,
    judged,
    plain_error,
)
from peers import by_peer, compile_by_block, require_peer
from subject import CAPTURED, Options, Variant
from support import available_bytes
from workload import Batch, build_model, load_batch

from snapkernels import quantise
from snapvideo_core import FIT, CapturedFIT, FITConfig, SnapDiffusion, training_loss
from snapvideo_core.capture import Outputs
from snapvideo_core.diffusion import Network
from snapvideo_core.flops import TRAIN_FORWARDS, floor_ms, graph_tflop

FORWARDS = {"infer": 1, "train": TRAIN_FORWARDS}
INCLUDES = {
    "infer": "one denoiser evaluation, no guidance",
    "train": "self-conditioning pass over the whole batch + forward + backward, no optimiser; "
    "gated in evaluation mode, gradients finite",
}


class FITSubject:
    """One FIT; see `Subject`.

    Args:
        config: its sizes.
        variant: of the backends "ours", "eager", "compile", "reference" and those of `PEERS`.
        options: of the run.
        batch: the first that is timed: what is compiled is gated at it.
        mode: "infer" or "train", what it is made for where the two differ (torchao); None for both.

    Raises:
        ImportError, NotImplementedError: a peer that cannot be had, with the reason.
        MemoryError: it cannot fit in a CPU's memory.
    """

    def __init__(
        self,
        config: FITConfig,
        variant: Variant,
        options: Options,
        batch: int,
        mode: str | None = None,
    ):
        self.config, self.variant, self.options = config, variant, options
        self.gate_batch = batch
        self._form: tuple[int, str] | None = None  # batch and mode that are compiled
        self._captured: CapturedFIT | None = None
        if variant.peer:
            require_peer(variant.backend)
        self.modes: tuple[str, ...] = (mode,) if mode else ("infer", "train")
        if not variant.trains:
            self.modes = ("infer",)
        require_cpu_memory(config, options, self.modes)
        calls = variant.backend if variant.backend in ("ours", "reference") else "eager"
        self.module: FIT = build_model(
            config, options.device, options.dtype, None if calls == "ours" else calls
        )

    def gated(self) -> tuple[str, dict[str, float]]:
        """Make of the model what is to be timed, and hold it against the float64 equations.

        Those are of the weights as they were built, on one video of the bench's own input (of ours
        quantised on several), with latents of an earlier evaluation. Ours quantised may be off by
        `QUANTISED_RATIO` of what plain fp8 is, another's by `QUANTISED_LIMIT`.
        """
        model, variant = self.module.eval(), self.variant
        judges_fp8 = variant.quantised and variant.backend == "ours"
        videos = gate_videos(self.config) if judges_fp8 else 1
        batch = self.gate_batch if variant.compiled else videos
        data = self._batch(batch)
        diffusion = SnapDiffusion(sigma_in=self.config.sigma_in)
        x = diffusion.network_input(data.x_sigma, data.sigma)
        with torch.no_grad():
            _, previous = model(x, data.sigma, data.cond)
        inputs = Inputs(x, data.sigma, data.cond, previous)
        expected = expected_output(model, inputs.first(videos))
        limit, eager = LIMITS[self.options.dtype], None
        if variant.peer:
            by_peer(model, variant.backend, training=self.modes == ("train",))
        elif variant.quantised:
            quantise(model, variant.recipe)
        if variant.backend == "compile":
            compile_by_block(model)
        if variant.quantised:
            limit = QUANTISED_LIMIT
        if judges_fp8:
            eager = plain_error(model, inputs, expected)
            limit = min(QUANTISED_RATIO * eager, limit)
        verdict, error = judged(self._network(data, self.modes[0]), inputs, expected, limit)
        if variant.backend == "eager":
            eager = error["rms_vs_fp64"]
        return verdict, error | ({"rms_eager": eager} if eager is not None else {})

    def inference(self, batch: int) -> Callable[[], object]:
        """One denoiser evaluation: c_in and c_skip scaling, network, self-conditioned."""
        data = self._batch(batch)
        self.module.eval()
        return inference(self._network(data, "infer"), self.module, data)

    def training_step(self, batch: int) -> Callable[[], object]:
        """Both passes and the backward pass."""
        data = self._batch(batch)
        self.module.train()
        self._network(data, "train")
        return training_step(self.module, data)

    def release(self) -> None:
        """Let go of the CUDA graph and its memory."""
        self._captured = None

    def includes(self, mode: str) -> str:
        captured = self.options.capture and mode == "infer"
        copies = ", with copies of its inputs and outputs"
        return INCLUDES[mode] + (CAPTURED + copies) * captured

    def tflop(self, mode: str) -> float:
        return graph_tflop(self.config) * FORWARDS[mode]

    def floor_ms(self, mode: str) -> float:
        """Without fp8 units quantised products run at the dtype's rate."""
        rate = self.options.tflop_s
        quantised = self.options.ceilings.get("fp8_tflop_s", rate)
        one = floor_ms(self.config, self.variant.recipe, tflop_s=rate, quantised_tflop_s=quantised)
        return FORWARDS[mode] * one

    def _batch(self, videos: int) -> Batch:
        options = self.options
        return load_batch(options.clip, self.config, videos, options.framerate, options.device)

    def _network(self, data: Batch, mode: str) -> Network:
        """The model or, for inference, its captured form for such a batch."""
        batch = len(data.sigma)
        if self._form != (batch, mode):
            self.release()
            if self.variant.compiled:
                torch.compiler.reset()  # eight forms of a call are compiled, and a ninth is not
            self._form = batch, mode
        if mode != "infer" or not self.options.capture:
            return self.module
        self._captured = self._captured or self.module.capture(data.x_sigma, data.sigma, data.cond)
        return self._captured


def inference(network: Network, model: FIT, data: Batch) -> Callable[[], Outputs]:
    """What evaluates `network`, which is `model` or its captured form, once as a denoiser."""
    config = model.config
    diffusion = SnapDiffusion(sigma_in=config.sigma_in)
    # The first has no latents before it: zeros, and not None, which would be compiled apart.
    latents = (len(data.sigma), config.num_latents, config.latent_dim)
    nothing = model.positions.new_zeros(latents)
    with torch.no_grad():
        _, previous = diffusion.denoise(network, data.x_sigma, data.sigma, data.cond, nothing)

    @torch.no_grad()
    def evaluate() -> Outputs:
        return diffusion.denoise(network, data.x_sigma, data.sigma, data.cond, previous)

    return evaluate


def training_step(model: FIT, data: Batch) -> Callable[[], object]:
    """What computes every gradient of `model` once.

    A user of PyTorch's calls draws noise by them and stores it; ours is counted.
    """
    diffusion = SnapDiffusion(sigma_in=model.config.sigma_in)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        eps = None if model.backend is None else torch.randn_like(data.video)
        loss = training_loss(model, diffusion, data.video, data.cond, sigma=data.sigma, eps=eps)
        loss.backward()

    return step


def require_cpu_memory(config: FITConfig, options: Options, modes: tuple[str, ...]) -> None:
    """Raise MemoryError where the weights and gradients alone exceed a CPU's free memory.

    Linux would grant them and then kill the process without a word.
    """
    if options.device.type == "cpu":
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in FIT(config).parameters())
        needed = numbers * options.dtype.itemsize * (2 if "train" in modes else 1)
        if needed > available_bytes():
            raise MemoryError
