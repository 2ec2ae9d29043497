"""What else a user can get fp8 products from: timed beside the backends.

torchao is used as it is meant to be: its matrices take the places of the bf16 ones, here in the
eager layers, and torch.compile does the rest. Transformer Engine is listed with why it is absent.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from snapkernels.ops.feed_forward import eager
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights

Layer = Callable[..., torch.Tensor]

_MOST_TUNED: dict[str, str | int | bool | Callable[..., Any]] = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "max_autotune_gemm_backends": "ATEN",
}
_MATRICES = WeakTensorKeyDictionary()  # {an op's e4m3 matrix: torchao's form of it}


def _torchao_linear(
    tokens: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *others: Any
) -> torch.Tensor:
    matrix = _matrix(weight, weight_scale, tokens.dtype)
    return compiled(eager.linear)(tokens, matrix, *others)


def _torchao_feed_forward(
    tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float
) -> torch.Tensor:
    weights = FeedForwardWeights(
        w.norm_weight,
        w.norm_bias,
        _matrix(w.fc1_weight, w.fc1_scale, tokens.dtype),
        w.fc1_bias,
        _matrix(w.fc2_weight, w.fc2_scale, tokens.dtype),
        w.fc2_bias,
    )
    return compiled(eager.feed_forward)(tokens, weights, 0.0, None, eps)


@cache
def compiled(layer: Layer) -> Layer:
    """`layer` compiled, a compilation a shape; too many of them raise an error.

    As torchao's users have it, by the options of max-autotune, but for CUDA graphs, which the bench
    records itself, and for Triton's products: it tries 105 a matrix, for a minute or two, and of
    four matrices of the cases none was faster than cuBLAS's.
    """
    return torch.compile(layer, dynamic=False, fullgraph=True, options=_MOST_TUNED)


def _matrix(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torchao's form of `weight`, made in the first call alone, which is not timed."""
    if weight not in _MATRICES:
        _MATRICES[weight] = quantised((weight.float() * scale[:, None]).to(dtype))
    return _MATRICES[weight]


def quantised(matrix: torch.Tensor) -> torch.Tensor:
    """(N, K) as torchao's e4m3 rows; what they are multiplied by is quantised by rows too.

    Raises:
        ImportError: torchao is not installed.
        NotImplementedError: it would multiply a matrix of such sizes as it is.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ImportError(f"torchao is absent: {error}") from error
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    # It would set Inductor's options for the whole process, and so for the rows of others.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(layer, config)
    if type(layer.weight) is nn.Parameter:
        raise NotImplementedError(f"torchao leaves a matrix of {tuple(matrix.shape)} as it is")
    return layer.weight


def transformer_engine(*_: Any) -> NoReturn:
    """Say why it is absent."""
    raise NotImplementedError(
        "Transformer Engine is absent: its part for PyTorch has no wheel, and would have to be "
        "compiled against the PyTorch and CUDA that are installed"
    )


def _peers(torchao: Layer) -> dict[str, Layer]:
    return {"torchao": torchao, "transformer-engine": transformer_engine}


LINEAR_FP8 = _peers(_torchao_linear)
FEED_FORWARD_FP8 = _peers(_torchao_feed_forward)
