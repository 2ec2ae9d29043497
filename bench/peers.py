"""What a practitioner would assemble of other software for a FIT, to be timed beside ours.

The sublayers of a FIT are replaced by the same layers as plain modules, nn.Linear around an
attention, which share their parameters; then torchao makes fp8 of the linears, or another attention
is called, and torch.compile does the rest, a block once for all.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from snapkernels.modules import FeedForward, GroupRead, GroupWrite, LatentAttention
from snapkernels.ops.feed_forward.peers import transformer_engine
from snapkernels.ops.group_attn.eager import attended
from snapkernels.ops.group_attn.peers import by_flash_attn
from snapvideo_core import FIT

Attention = Callable[..., torch.Tensor]
NEEDS = {
    "torchao": "torchao.quantization",
    "flash-attn": "flash_attn.cute",
    "xformers": "xformers.ops",
}


class PlainFeedForward(nn.Module):
    """A `FeedForward` as (..., dim) -> (..., dim) through nn.Linear."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        self.norm, self.fc1, self.fc2 = layer.norm, layer.fc1, layer.fc2
        self.dropout = nn.Dropout(layer.dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(gelu(self.fc1(self.norm(tokens))))) + tokens


class PlainAttention(nn.Module):
    """A `GroupRead`, `GroupWrite` or `LatentAttention` through nn.Linear and `attention`."""

    def __init__(self, layer: GroupRead | GroupWrite | LatentAttention, attention: Attention):
        super().__init__()
        self.attention, self.num_heads = attention, layer.num_heads
        self.q, self.k, self.v, self.o = layer.q, layer.k, layer.v, layer.o

    def updated(
        self,
        tokens: torch.Tensor,
        q_in: torch.Tensor,
        kv_in: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`tokens` and what their queries read: all (B, G, ..., dim), the mask (B, G, N)."""
        context = attended(
            self.q(q_in),
            self.k(kv_in),
            self.v(kv_in),
            mask,
            self.num_heads,
            # Others' attentions take no mask; only the short conditioning read has one.
            attention=self.attention if mask is None else scaled_dot_product_attention,
        )
        return self.o(context) + tokens


class PlainCrossAttention(PlainAttention):
    """(B, G, L, q_dim) and (B, G, N, kv_dim) -> (B, G, L, q_dim)."""

    def __init__(self, layer: GroupRead | GroupWrite, attention: Attention):
        super().__init__(layer, attention)
        self.q_norm, self.kv_norm = layer.q_norm, layer.kv_norm

    def forward(
        self, tokens: torch.Tensor, others: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.updated(tokens, self.q_norm(tokens), self.kv_norm(others), mask)


class PlainSelfAttention(PlainAttention):
    """(B, L, dim) -> (B, L, dim)."""

    def __init__(self, layer: LatentAttention, attention: Attention):
        super().__init__(layer, attention)
        self.norm = layer.norm

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        z = self.norm(latents)[:, None]
        return self.updated(latents[:, None], z, z)[:, 0]


def require_peer(backend: str) -> None:
    """Raise ImportError or NotImplementedError where `backend` cannot be had, with the reason."""
    if backend == "te":
        transformer_engine()
    try:
        import_module(NEEDS[backend])
    except ImportError as error:
        raise ImportError(f"{backend} is absent: {error}") from error


def by_peer(model: FIT, backend: str, *, training: bool) -> None:
    """Make of `model`, in place, what the peer called `backend` runs; `require_peer` first."""
    _make_plain(model, ATTENTIONS.get(backend, scaled_dot_product_attention))
    if backend == "torchao":
        (_train_by_torchao if training else _quantise_by_torchao)(model)
    compile_by_block(model)


def compile_by_block(model: FIT) -> None:
    """torch.compile of `model`: a block is compiled once and called as often as there are blocks.

    Whole models compile many times longer, to the same kernels. Around the blocks stem,
    conditioning and head are compiled too. All with torch.compile's default options.
    """
    for block in model.blocks:
        block.forward = _called_whole(torch.compile(block.forward, dynamic=False))
    model.compile(dynamic=False)  # else a second batch is compiled for any batch


def _called_whole(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` as a call that what is compiled around it does not take apart."""

    @torch.compiler.disable(recursive=False)
    def call(*values: Any) -> Any:
        return compiled(*values)

    return call


def _make_plain(module: nn.Module, attention: Attention) -> None:
    for name, child in module.named_children():
        if isinstance(child, FeedForward):
            plain: nn.Module = PlainFeedForward(child)
        elif isinstance(child, LatentAttention):
            plain = PlainSelfAttention(child, attention)
        elif isinstance(child, (GroupRead, GroupWrite)):
            plain = PlainCrossAttention(child, attention)
        else:
            _make_plain(child, attention)
            continue
        setattr(module, name, plain.train(child.training))


def _taken(module: nn.Module, name: str) -> bool:
    """Whether torchao is to make fp8 of it: what the recipe fp8 takes, absorbed or not."""
    sublayers, kept = ("blocks.", "self_conditioning.ff."), "blocks.0.cond_read."
    is_linear = isinstance(module, nn.Linear)
    return is_linear and name.startswith(sublayers) and not name.startswith(kept)


def _quantise_by_torchao(model: FIT) -> None:
    """e4m3 weights, and inputs quantised on the way; both by rows."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    model.requires_grad_(False)
    # It would set Inductor's options for the whole process, and so for the rows of others.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(model, config, filter_fn=_taken)


def _train_by_torchao(model: FIT) -> None:
    """fp8 products forward and backward, one scale a tensor: its fastest recipe."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, module_filter_fn=_taken, config=config)


def _xformers(
    q_BHQE: torch.Tensor, k_BHKE: torch.Tensor, v_BHKE: torch.Tensor, *, attn_mask: None
) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    by_token = (one.transpose(1, 2) for one in (q_BHQE, k_BHKE, v_BHKE))
    return memory_efficient_attention(*by_token).transpose(1, 2)


def _outside(attention: Attention) -> Attention:
    """`attention` as a call that torch.compile does not look into."""

    @torch.compiler.disable
    def call(*values: Any, **keywords: Any) -> torch.Tensor:
        return attention(*values, **keywords)

    return call


ATTENTIONS: dict[str, Attention] = {
    "flash-attn": _outside(by_flash_attn),
    "xformers": _outside(_xformers),
}
