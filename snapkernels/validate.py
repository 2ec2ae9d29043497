"""Argument checks: named dimensions, one dtype and one device per call, rules between sizes.

A rule is text: "T / group[0]" says that the product on the left divides without rest by the one on
the right, and "N = group[0] * group[1]" names a size, or holds an argument's size against it.
"""

import re
from math import prod
from typing import Any, NamedTuple, NoReturn

import torch


def _positive(value: Any) -> bool:
    """Whether it is an int from 1 on, a symbolic one of a trace with dynamic shapes included."""
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return whole and value >= 1


class Rule(NamedTuple):
    """One rule between sizes: [name =] product of `over` [/ product of `under`]."""

    text: str
    name: str | None
    over: tuple[str, ...]
    under: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read "H / (patch * group[1])" or "P = C * patch * patch"."""
        name, equals, ratio = text.rpartition("=")
        over, _, under = ratio.partition("/")
        factors = re.compile(r"[\w\[\]]+").findall
        return cls(text, name.strip() if equals else None, (*factors(over),), (*factors(under),))


class Arguments:
    """Binds the named sizes of one call and checks each argument against those before it.

    After args.bind("latents", latents, ("B", "G", "L", "D")), binding patches to ("B", "G", "N",
    "C") fails unless patches has the B and G of latents. Every check raises ValueError, naming the
    op, the argument, its value and what is allowed.
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
        dims: tuple[str, ...],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check that `tensor` has the dimensions called `dims` and remember their sizes.

        A first dimension "..." stands for any number; its size is their product. The first tensor
        must be floating point and sets device and dtype for the others, unless one names its own
        `dtype`.
        """
        if not isinstance(tensor, torch.Tensor):
            self.fail(f"{name} must be a tensor, got {type(tensor).__name__}")
        shape: tuple[int, ...] = tensor.shape
        if dims[0] == "..." and len(shape) >= len(dims) - 1:
            leading = len(shape) - len(dims) + 1
            shape = (prod(shape[:leading]), *shape[leading:])
        if len(shape) != len(dims):
            least = "at least " * (dims[0] == "...")
            wanted = len(dims) - (dims[0] == "...")
            self.fail(
                f"{name} must have {least}{wanted} dimensions ({', '.join(dims)}), "
                f"got shape {tuple(tensor.shape)}"
            )
        sizes = self.sizes
        for dim, size in zip(dims, shape, strict=True):
            if dim not in sizes:
                sizes[dim] = size
                self._bound_by[dim] = name
            elif sizes[dim] != size:
                self.fail(
                    f"{name} has {dim} = {size} in shape {tuple(tensor.shape)} of "
                    f"({', '.join(dims)}), but {self._bound_by[dim]} has {dim} = {sizes[dim]}"
                )
        self._check_dtype_and_device(name, tensor, dtype)

    def bind_fields(self, name: str, fields: tuple, dims: dict[str, tuple[str, ...]]) -> None:
        """Bind every tensor of the named tuple `fields`, called `name`, to its `dims`."""
        if getattr(fields, "_fields", None) != tuple(dims):
            self.fail(f"{name} must have the fields {', '.join(dims)}, got {type(fields).__name__}")
        known = self.sizes.get
        first = self._first[1] if self._first else None
        dtype, device = (first.dtype, first.device) if first is not None else (None, None)
        for (field, names), tensor in zip(dims.items(), fields, strict=True):
            # What fits is passed over in half a microsecond: a host-bound model feels the rest.
            if not (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype is dtype
                and tensor.shape == tuple(map(known, names))
                and tensor.device == device
            ):
                self.bind(f"{name}.{field}", tensor, names)

    def count(self, name: str, value: Any) -> None:
        """Check that `value` is a positive int and remember it as a size."""
        if not _positive(value):
            self.fail(f"{name} must be a positive int, got {value!r}")
        self.sizes[name] = value

    def three(self, name: str, value: Any) -> None:
        """Check that `value` is three positive ints (T, H, W); they become name[0] to name[2]."""
        if not isinstance(value, tuple | list) or len(value) != 3:
            self.fail(f"{name} must be three positive ints (T, H, W), got {value!r}")
        for index, part in enumerate(value):
            if not _positive(part):
                self.fail(f"{name} must be three positive ints (T, H, W), got {value!r}")
            self.sizes[f"{name}[{index}]"] = part

    def probability(self, name: str, value: Any) -> None:
        """Check that `value` is in [0, 1)."""
        if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            self.fail(f"{name} must be in [0, 1), got {value!r}")

    def number(self, name: str, value: Any) -> None:
        """Check that `value` is a number that is not negative."""
        if not isinstance(value, (int, float)) or not value >= 0:
            self.fail(f"{name} must be a number of at least 0, got {value!r}")

    def hold(self, rule: Rule) -> None:
        """Check `rule`; a name it gives becomes a size, or must be the size that has it."""
        sizes = self.sizes
        whole, part = 1, 1
        for factor in rule.over:
            whole = whole * sizes[factor]
        for factor in rule.under:
            part = part * sizes[factor]
        if part != 1 and whole % part:
            self.fail(f"{self._product(rule.over)} is not divisible by {self._product(rule.under)}")
        if rule.name is None:
            return
        value = whole if part == 1 else whole // part
        if sizes.setdefault(rule.name, value) != value:
            self.fail(
                f"{self._bound_by[rule.name]} has {rule.name} = {sizes[rule.name]}, but "
                f"{rule.text} = {value}"
            )

    def fail(self, message: str) -> NoReturn:
        """Raise ValueError, naming the op."""
        raise ValueError(f"{self.op}: {message}")

    def _product(self, factors: tuple[str, ...]) -> str:
        values = [self.sizes[factor] for factor in factors]
        shown = " * ".join(factors)
        if len(values) > 1:
            shown += f" = {' * '.join(map(str, values))}"
        return f"{shown} = {prod(values)}"

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
