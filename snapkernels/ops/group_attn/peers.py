"""The eager layer around every attention core that a user can get: timed beside the backends.

Legend: B batch, H heads, Q query and K key tokens, E channels of a head.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from snapkernels.ops.group_attn import eager

Layer = Callable[..., torch.Tensor]


def _forced(core: SDPBackend, layer: Layer, *values: Any) -> torch.Tensor:
    """`layer` with no SDPA backend but `core`, which raises RuntimeError where it cannot run."""
    with sdpa_kernel(core):
        return layer(*values)


def _flex(
    q_BHQE: torch.Tensor, k_BHKE: torch.Tensor, v_BHKE: torch.Tensor, *, attn_mask: None
) -> torch.Tensor:
    _refuse_mask("FlexAttention", attn_mask)
    return compiled_flex()(q_BHQE, k_BHKE, v_BHKE)


@cache
def compiled_flex() -> Layer:
    """FlexAttention compiled, a compilation a shape; too many of them raise an error."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def by_flash_attn(
    q_BHQE: torch.Tensor, k_BHKE: torch.Tensor, v_BHKE: torch.Tensor, *, attn_mask: None
) -> torch.Tensor:
    """flash-attn-4 in the place of SDPA.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: there is a mask.
    """
    _refuse_mask("flash-attn-4", attn_mask)
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise ImportError(f"flash-attn-4 is absent: {error}") from error
    found = flash_attn_func(*(one.transpose(1, 2) for one in (q_BHQE, k_BHKE, v_BHKE)))
    context_BQHE = found[0] if isinstance(found, tuple) else found
    return context_BQHE.transpose(1, 2)


def _refuse_mask(name: str, attn_mask: torch.Tensor | None) -> None:
    if attn_mask is not None:
        raise NotImplementedError(f"{name} is timed without a mask only")


def _peers(layer: Layer) -> dict[str, Layer]:
    return {
        "sdpa-flash": partial(_forced, SDPBackend.FLASH_ATTENTION, layer),
        "sdpa-cudnn": partial(_forced, SDPBackend.CUDNN_ATTENTION, layer),
        "sdpa-efficient": partial(_forced, SDPBackend.EFFICIENT_ATTENTION, layer),
        "flex": partial(layer, attention=_flex),
        "flash-attn": partial(layer, attention=by_flash_attn),
    }


READ = _peers(eager.cross_attention)
WRITE = _peers(eager.group_write)
