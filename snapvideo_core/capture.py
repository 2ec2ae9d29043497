"""A whole FIT as one CUDA graph: where the host takes longer to launch than the GPU to run.

The 500M model's evaluation at batch 16 takes the host 27 to 34 ms to launch, kernel by kernel, and
an H100 28 ms to run (DESIGN.md, "Records"); a replay is one launch.
"""

from collections.abc import Callable

import torch

from snapvideo_core.fit import FIT, Conditioning, Loss, Mix, at_least_fp32

WARM_UPS = 3  # evaluations before the capture: kernels are compiled and chosen in them
Outputs = tuple[torch.Tensor, torch.Tensor]


class CapturedFIT:
    """A `FIT` at one batch size, as a CUDA graph; `FIT.capture` makes it, a call is the FIT's.

    `SnapDiffusion.denoise` and `sample` take it for the FIT. One graph serves every call: previous
    latents left out are zeros, a scale left out is 1, and no end is the sum 1 F + 0 + 0.

    The graph reads the weights where they lay when it was captured: it sees what is written into
    them, not what they are replaced by, so a model that is moved, cast or quantised afterwards has
    to be captured anew. Calls share their memory: make them on one stream.
    """

    def __init__(
        self, model: FIT, x_BCTHW: torch.Tensor, sigma_B: torch.Tensor, cond: Conditioning
    ):
        config = model.config
        if any(module.training for module in model.modules()):
            raise ValueError(f"FIT {config.name}: capture needs evaluation mode: call eval() first")
        self.name = config.name
        # The graph's memory is written in later calls, and belongs to no graph of gradients.
        with torch.inference_mode(False), torch.no_grad():
            self._record(model, x_BCTHW, sigma_B, cond)

    def _record(
        self, model: FIT, x_BCTHW: torch.Tensor, sigma_B: torch.Tensor, cond: Conditioning
    ) -> None:
        config, weight, wide = model.config, model.positions, at_least_fp32(sigma_B)
        self._absent = {
            "previous": weight.new_zeros(()),
            "scale": wide.new_ones(()),
            "end.mix": wide.new_tensor([1.0, 0.0, 0.0]),
            "end.video": x_BCTHW.new_zeros(()),
            "end.other": x_BCTHW.new_zeros(()),
        }
        batch = len(x_BCTHW)
        given = _named(x_BCTHW, sigma_B, cond, None, None, None)
        self._inputs = {
            name: torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
            for name, tensor in given.items()
            if tensor is not None
        } | {
            "previous": weight.new_zeros(batch, config.num_latents, config.latent_dim),
            "scale": wide.new_ones(batch),
            "end.mix": self._absent["end.mix"].repeat(batch, 1),
            "end.video": torch.zeros_like(x_BCTHW, memory_format=torch.contiguous_format),
            "end.other": torch.zeros_like(x_BCTHW, memory_format=torch.contiguous_format),
        }
        # Alive as long as the graph, though the model may come to have others.
        self._weights = [one.detach() for one in (*model.parameters(), *model.buffers())]
        inputs = self._inputs
        static = Conditioning(
            **{name: inputs.get(f"cond.{name}") for name in vars(cond)}  # type: ignore[arg-type]
        )
        end = Mix(mix=inputs["end.mix"], video=inputs["end.video"], other=inputs["end.other"])

        def evaluate() -> Outputs:
            return model(
                inputs["x"],
                inputs["sigma"],
                static,
                inputs["previous"],
                scale_B=inputs["scale"],
                end=end,
            )

        self._replay, self._outputs = recorded(evaluate, weight.device, config.name)

    @torch.no_grad()
    def __call__(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        cond: Conditioning,
        previous_BLD: torch.Tensor | None = None,
        *,
        scale_B: torch.Tensor | None = None,
        end: Mix | Loss | None = None,
        clone: bool = True,
    ) -> Outputs:
        """Evaluate the network once, by a replay: as `FIT.forward`, without gradients.

        Args:
            x_BCTHW, sigma_B, cond: of the shapes, dtypes and device that were captured.
            previous_BLD: (B, L, latent_dim) in the weights' dtype, or None.
            scale_B: (B,) in sigma's dtype or, if that is narrower, float32; or None.
            end: a `Mix` whose videos are like x and whose mix has the dtype of `scale_B`, or None.
            clone: False for the graph's own memory, which the next call overwrites.

        Raises:
            ValueError: an input differs from what was captured, or the end is a `Loss`.
        """
        if isinstance(end, Loss):
            raise ValueError(f"FIT {self.name}, captured: end must be a Mix or None, got a Loss")
        given = _named(x_BCTHW, sigma_B, cond, previous_BLD, scale_B, end)
        for name, tensor in given.items():
            self._check(name, tensor)
        for name, held in self._inputs.items():
            tensor = given[name]
            held.copy_(self._absent[name] if tensor is None else tensor)
        self._replay()
        F, z = self._outputs
        return (F.clone(), z.clone()) if clone else (F, z)

    def _check(self, name: str, tensor: torch.Tensor | None) -> None:
        held = self._inputs.get(name)
        if tensor is None and (held is None or name in self._absent):
            return
        wanted, got = (_form(one) for one in (held, tensor))
        if wanted != got:
            raise ValueError(
                f"FIT {self.name}, captured: {name} must be {wanted} as captured, got {got}"
            )


def recorded(
    evaluate: Callable[[], Outputs], device: torch.device, name: str
) -> tuple[Callable[[], None], Outputs]:
    """What `evaluate` launches as a CUDA graph: its replay, and the outputs it writes each time.

    Raises:
        ValueError: `device` is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(
            f"FIT {name}: capture makes a CUDA graph, but the model is on {device.type}"
        )
    with torch.cuda.device(device):
        # PyTorch asks for warm-ups on another stream than the one that work is captured from.
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                evaluate()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = evaluate()
    return graph.replay, outputs


def _named(
    x: torch.Tensor,
    sigma: torch.Tensor,
    cond: Conditioning,
    previous: torch.Tensor | None,
    scale: torch.Tensor | None,
    end: Mix | None,
) -> dict[str, torch.Tensor | None]:
    """Every tensor of a call under the name that messages have for it."""
    return {
        "x": x,
        "sigma": sigma,
        **{f"cond.{name}": tensor for name, tensor in vars(cond).items()},
        "previous": previous,
        "scale": scale,
        "end.mix": end and end.mix,
        "end.video": end and end.video,
        "end.other": end and end.other,
    }


def _form(tensor: torch.Tensor | None) -> str:
    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
