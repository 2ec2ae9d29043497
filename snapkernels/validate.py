"""Argument checks shared by the ops: named dimensions, one dtype and one device per call."""

import torch


class Arguments:
    """Binds the named dimensions of one call and checks each argument against those before it.

    After args.bind("latents", latents, ("B", "G", "L", "D")), binding patches to ("B", "G", "N",
    "C") fails unless patches has the B and G of latents.
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self._bound_by: dict[str, str] = {}
        self._first: tuple[str, torch.Tensor] | None = None

    def bind(
        self,
        name: str,
        tensor: torch.Tensor,
        names: tuple[str, ...],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check that `tensor` has the dimensions called `names` and remember their sizes.

        The first tensor must be floating point and sets device and dtype for the others, unless
        one names its own `dtype`.

        Raises:
            ValueError: not a tensor, wrong number of dimensions, a size that contradicts an
                earlier argument, or another dtype or device.
        """
        if not isinstance(tensor, torch.Tensor):
            self.fail(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != len(names):
            self.fail(
                f"{name} must have {len(names)} dimensions ({', '.join(names)}), "
                f"got shape {tuple(tensor.shape)}"
            )
        for dim, size in zip(names, tensor.shape, strict=True):
            if self.sizes.setdefault(dim, size) != size:
                self.fail(
                    f"{name} has {dim} = {size} in shape {tuple(tensor.shape)} of "
                    f"({', '.join(names)}), but {self._bound_by[dim]} has {dim} = {self.sizes[dim]}"
                )
            self._bound_by.setdefault(dim, name)
        self._check_dtype_and_device(name, tensor, dtype)

    def bind_fields(self, name: str, fields: tuple, dims: dict[str, tuple[str, ...]]) -> None:
        """Bind every tensor of the named tuple `fields`, called `name`, to its `dims`."""
        if getattr(fields, "_fields", None) != tuple(dims):
            self.fail(f"{name} must have the fields {', '.join(dims)}, got {type(fields).__name__}")
        known = self.sizes.get
        first = self._first[1] if self._first else None
        for (field, names), tensor in zip(dims.items(), fields, strict=True):
            # What fits is passed over in half a microsecond: a host-bound model feels the rest.
            if not (
                isinstance(tensor, torch.Tensor)
                and first is not None
                and tensor.shape == tuple(map(known, names))
                and tensor.dtype == first.dtype
                and tensor.device == first.device
            ):
                self.bind(f"{name}.{field}", tensor, names)

    def divides(self, name: str, divisor: int, what: str, size: int) -> None:
        """Check that the positive int `divisor`, called `name`, divides `size`, called `what`."""
        if not isinstance(divisor, int) or divisor < 1:
            self.fail(f"{name} must be a positive int, got {divisor!r}")
        if size % divisor:
            self.fail(f"{what} = {size} is not divisible by {name} = {divisor}")

    def fail(self, message: str) -> None:
        """Raise ValueError, naming the op."""
        raise ValueError(f"{self.op}: {message}")

    def _check_dtype_and_device(
        self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None
    ) -> None:
        if self._first is None:
            if not tensor.is_floating_point():
                self.fail(f"{name} must be floating point, got {tensor.dtype}")
            self._first = (name, tensor)
            return
        first_name, first = self._first
        wanted = first.dtype if dtype is None else dtype
        if tensor.dtype != wanted:
            because = f" like {first_name}" if dtype is None else ""
            self.fail(f"{name} must be {wanted}{because}, got {tensor.dtype}")
        if tensor.device != first.device:
            self.fail(f"{name} is on {tensor.device}, but {first_name} is on {first.device}")
