"""Argument checks: named dimensions, one dtype and one device per call, rules between sizes.

A rule is text: "T / group[0]" says that the product on the left divides without rest by the one on
the right, "N = group[0] * group[1]" names a size, or holds an argument's size against it, and
"R = ceil(H / patch)" rounds up. A factor may be a number, or a sum such as (C + c) of sizes, where
that of an argument left out is 0.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Any, Literal, NamedTuple, NoReturn

import torch

# What a tensor's dtype is: one by name; any floating one, on its own; that of the call, but at
# least float32; or, for None, that of the call, which the first such tensor sets.
Dtype = torch.dtype | Literal["free", "wide"] | None


def _positive(value: Any) -> bool:
    """Whether it is an int from 1 on, a symbolic one of a trace with dynamic shapes included."""
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return whole and value >= 1


class Rule(NamedTuple):
    """One rule between sizes: [name =] product of `over` [/ product of `under`, rounded up]."""

    text: str
    name: str | None
    over: tuple[str, ...]
    under: tuple[str, ...]
    up: bool

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Read "H / (patch * group[1])", "P = C * patch * patch" or "R = ceil(H / patch)"."""
        name, equals, ratio = text.rpartition("=")
        up = ratio.strip().startswith("ceil(")
        over, _, under = ratio.replace("ceil(", "").partition("/")
        factors = re.compile(r"[\w\[\]]+(?: \+ [\w\[\]]+)*").findall
        named = name.strip() if equals else None
        return cls(text, named, (*factors(over),), (*factors(under),), up)


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
        self._placed: tuple[str, torch.Tensor] | None = None  # the first tensor, for the device
        self._typed: tuple[str, torch.Tensor] | None = None  # the first of the call's dtype
        self._leading: tuple[str, tuple[int, ...]] | None = None  # the first that has a "..."

    def bind(
        self,
        name: str,
        tensor: torch.Tensor,
        dims: tuple[str, ...],
        *,
        dtype: Dtype = None,
    ) -> None:
        """Check that `tensor` has the dimensions called `dims` and remember their sizes.

        A first dimension "..." stands for any number, the same ones in every tensor that has it;
        its size is their product. The first tensor sets the device of the others; the first of no
        dtype of its own must be floating point and sets theirs.
        """
        if not isinstance(tensor, torch.Tensor):
            self.fail(f"{name} must be a tensor, got {type(tensor).__name__}")
        shape: tuple[int, ...] = tensor.shape
        if dims[:1] == ("...",) and len(shape) >= len(dims) - 1:
            leading = len(shape) - len(dims) + 1
            self._lead(name, shape[:leading])
            shape = (prod(shape[:leading]), *shape[leading:])
        if len(shape) != len(dims):
            least = "at least " * (dims[:1] == ("...",))
            wanted = len(dims) - (dims[:1] == ("...",))
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

    def _lead(self, name: str, shape: tuple[int, ...]) -> None:
        """Hold the dimensions for which `name` has "..." against those of the first that has it."""
        first, expected = self._leading = self._leading or (name, tuple(shape))
        if tuple(shape) != expected:
            self.fail(f"{name} has leading dimensions {tuple(shape)}, but {first} has {expected}")

    def bind_fields(
        self,
        name: str,
        fields: tuple,
        dims: dict[str, tuple[str, ...]],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Bind every tensor of the named tuple `fields`, called `name`, to its `dims`.

        Those that `dtypes` names have these dtypes, the others that of the call.
        """
        if getattr(fields, "_fields", None) != tuple(dims):
            self.fail(f"{name} must have the fields {', '.join(dims)}, got {type(fields).__name__}")
        known = self.sizes.get
        for (field, names), tensor in zip(dims.items(), fields, strict=True):
            first = self._typed[1] if self._typed else None
            own = dtypes.get(field)
            dtype, device = (first.dtype, first.device) if first is not None else (None, None)
            # What fits is passed over in half a microsecond: a host-bound model feels the rest.
            if not (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype is (own or dtype)
                and tensor.shape == tuple(map(known, names))
                and tensor.device == device
            ):
                self.bind(f"{name}.{field}", tensor, names, dtype=own)

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

    def positive(self, name: str, value: Any) -> None:
        """Check that `value` is a finite number above 0."""
        if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.fail(f"{name} must be a finite number above 0, got {value!r}")

    def seed(self, name: str, value: Any) -> None:
        """Check that `value` is an int from 0 to 2^63 - 1."""
        whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        if not whole or not 0 <= value < 2**63:
            self.fail(f"{name} must be an int from 0 to 2^63 - 1, got {value!r}")

    def optional_seed(self, name: str, value: Any) -> None:
        """Check that `value` is None or a `seed`."""
        if value is not None:
            self.seed(name, value)

    def number(self, name: str, value: Any) -> None:
        """Check that `value` is a number that is not negative."""
        if not isinstance(value, (int, float)) or not value >= 0:
            self.fail(f"{name} must be a number of at least 0, got {value!r}")

    def hold(self, rule: Rule) -> None:
        """Check `rule`; a name it gives becomes a size, or must be the size that has it."""
        sizes = self.sizes
        whole, part = 1, 1
        for factor in rule.over:
            whole = whole * self._value(factor)
        for factor in rule.under:
            part = part * self._value(factor)
        if rule.up:
            whole = -(-whole // part) * part
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

    def _value(self, factor: str) -> int:
        if factor.isdecimal():
            return int(factor)
        if " + " in factor:
            return sum(self.sizes.get(term, 0) for term in factor.split(" + "))
        return self.sizes[factor]

    def _product(self, factors: tuple[str, ...]) -> str:
        values = [self._value(factor) for factor in factors]
        shown = " * ".join(factors)
        if len(values) > 1:
            shown += f" = {' * '.join(map(str, values))}"
        return f"{shown} = {prod(values)}"

    def _check_dtype_and_device(self, name: str, tensor: torch.Tensor, dtype: Dtype) -> None:
        if self._placed is None:
            self._placed = (name, tensor)
        first_name, first = self._placed
        if tensor.device != first.device:
            self.fail(f"{name} is on {tensor.device}, but {first_name} is on {first.device}")
        if dtype == "free" or (dtype is None and self._typed is None):
            if not tensor.is_floating_point():
                self.fail(f"{name} must be floating point, got {tensor.dtype}")
            if dtype is None:
                self._typed = (name, tensor)
            return
        like = ""
        if not isinstance(dtype, torch.dtype):
            assert self._typed is not None
            typed_name, typed = self._typed
            dtype, like = resolved(dtype, typed.dtype), f" like {typed_name}"
        if tensor.dtype != dtype:
            self.fail(f"{name} must be {dtype}{like}, got {tensor.dtype}")


def resolved(dtype: Dtype, of_call: torch.dtype) -> torch.dtype:
    """The dtype that `dtype` is in a call of `of_call`; a free one is as wide as "wide"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return of_call if dtype is None else torch.promote_types(of_call, torch.float32)
