"""The cases of latent_attention, and what fp8 has beside them."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch.nn.functional import layer_norm

from snapkernels.ops.latent_attn.weights import SelfAttentionWeights
from snapkernels.spec import Case, Tier

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Drawn = tuple[torch.Tensor, SelfAttentionWeights]
Change = Callable[..., Drawn]
LOUDER = 50  # than others, as trained models have channels and heads
OUTWEIGHS = 300  # ordinary keys that a sink weighs as much as


def _case(
    name: str,
    tier: Tier,
    tokens: tuple[int, int],
    widths: tuple[int, int],
    num_heads: int,
    *,
    eps: float = 1e-6,
    **more: Any,
) -> Case:
    """A case of (B, L) `tokens`, and D and I in `widths`."""
    sizes = dict(zip("BLDI", (*tokens, *widths), strict=True))
    return Case(
        name=name, tier=tier, sizes=sizes, options={"num_heads": num_heads, "eps": eps}, **more
    )


def sublayer_cases() -> tuple[Case, ...]:
    """The cases of self-attention from LayerNorm to residual."""
    return (
        _case("odd", "cpu", (2, 7), (20, 12), 3, dtypes=(BF16, FP32, FP64)),
        # One past a tile of 128 latents, heads of 20.
        _case("ragged", "cpu", (2, 129), (28, 40), 2),
        _case("one-latent", "cpu", (3, 1), (16, 8), 2),
        _case("one-head", "cpu", (1, 5), (64, 48), 1),
        _case("heads-of-one", "cpu", (2, 6), (10, 6), 6),
        # Next to the variance of the inputs, 1e-6 is nothing.
        _case("large-eps", "cpu", (2, 5), (12, 12), 2, eps=0.1),
        _case("3.9b", "paper", (16, 768), (3072, 3072), 24, dtypes=(BF16,)),
        _case("up", "paper", (1, 768), (3072, 3072), 24, dtypes=(BF16,)),
        _case("500m-b64", "paper", (64, 512), (1024, 1024), 16, dtypes=(BF16,)),
    )


def fp8_cases() -> tuple[Case, ...]:
    """`sublayer_cases`, and what 8-bit numbers could be wrong on."""
    return (
        *(case for case in sublayer_cases() if case.name != "heads-of-one"),
        _case("heads-of-two", "cpu", (2, 6), (12, 8), 4),
        _case("heads-of-four", "cpu", (2, 6), (12, 8), 2),
        _case("heads-of-64", "cpu", (1, 129), (64, 128), 2, dtypes=(BF16, FP16)),
        _case("heads-of-128", "cpu", (1, 129), (64, 128), 1, dtypes=(BF16, FP32)),
        _case("peaked", "cpu", (1, 70), (64, 128), 2, change=_peaked),
        _case("sink", "cpu", (1, 300), (64, 64), 2, change=_sink(32)),
        _case("loud-head", "cpu", (1, 40), (64, 96), 3, change=_loud_head(32)),
        _case("outliers", "cpu", (1, 40), (51, 64), 2, change=_outliers),
        _case("zero-rows", "cpu", (2, 40), (64, 64), 2, change=_zero_rows),
        # Widths that compiled kernels take, and counts of tokens around their tiles.
        _case("one-latent-tiles", "gpu", (3, 1), (256, 256), 4, dtypes=(BF16,)),
        _case("ragged-tiles", "gpu", (2, 129), (256, 512), 8, dtypes=(BF16,)),
        _case("ragged-tiles-of-128", "gpu", (2, 129), (256, 512), 4, dtypes=(BF16,)),
        _case("tiles-of-128", "gpu", (3, 300), (512, 512), 4, dtypes=(BF16,)),
        _case("large-eps-tiles", "gpu", (2, 90), (256, 256), 2, eps=0.1, dtypes=(BF16,)),
        _case("peaked-tiles", "gpu", (2, 200), (256, 256), 2, dtypes=(BF16,), change=_peaked),
        _case("sink-tiles", "gpu", (1, 768), (256, 256), 4, dtypes=(BF16,), change=_sink(64)),
        _case(
            "loud-head-tiles", "gpu", (1, 200), (256, 256), 4, dtypes=(BF16,), change=_loud_head(64)
        ),
        _case("outlier-tiles", "gpu", (1, 200), (256, 256), 4, dtypes=(BF16,), change=_outliers),
        _case("zero-row-tiles", "gpu", (2, 200), (256, 256), 4, dtypes=(BF16,), change=_zero_rows),
        # The same of heads whose core CUDA has in integers.
        *(
            _case(f"{name}-of-128", "gpu", tokens, (256, 512), 4, dtypes=(BF16,), change=change)
            for name, tokens, change in (
                ("sink-tiles", (1, 768), _sink(128, 100)),
                ("loud-head-tiles", (1, 200), _loud_head(128)),
                ("outlier-tiles", (1, 200), _outliers),
                ("zero-row-tiles", (2, 200), _zero_rows),
            )
        ),
    )


def _peaked(latents: torch.Tensor, weights: SelfAttentionWeights) -> Drawn:
    """One key takes all: every token's own, of which its query is eight times as large."""
    loud = {"q_weight": 8 * weights.k_weight, "q_bias": 8 * weights.k_bias}
    return latents, weights._replace(**loud)


def _sink(channels: int, outweighs: int = OUTWEIGHS) -> Change:
    """In every head one key weighs `outweighs` times as much as others, as trained models have it.

    q's bias is along it. Most of what is read still comes from the others.
    """

    def change(latents: torch.Tensor, weights: SelfAttentionWeights) -> Drawn:
        sink_D = layer_norm(latents[0, 5].float(), latents.shape[-1:])
        key_HE = (weights.k_weight.float() @ sink_D).view(-1, channels)
        score = log(outweighs) * channels**0.5
        along_HE = key_HE * score / key_HE.square().sum(1, keepdim=True)
        bias_I = along_HE.view(-1).to(latents.dtype)
        plain = torch.ones_like(weights.norm_weight)
        return latents, weights._replace(norm_weight=plain, q_bias=bias_I)

    return change


def _loud_head(channels: int) -> Change:
    """The keys of the first head `LOUDER`, and its queries as much quieter.

    With a softmax of the loudest score alone nothing would be seen of how the others are rounded.
    """

    def change(latents: torch.Tensor, weights: SelfAttentionWeights) -> Drawn:
        k_weight, q_weight, q_bias = (
            one.clone() for one in (weights.k_weight, weights.q_weight, weights.q_bias)
        )
        k_weight[:channels] *= LOUDER
        q_weight[:channels] /= LOUDER
        q_bias[:channels] /= LOUDER
        return latents, weights._replace(k_weight=k_weight, q_weight=q_weight, q_bias=q_bias)

    return change


def _outliers(latents: torch.Tensor, weights: SelfAttentionWeights) -> Drawn:
    """Every 17th channel `LOUDER`."""
    louder = latents.clone()
    louder[..., ::17] *= LOUDER
    return louder, weights


def _zero_rows(latents: torch.Tensor, weights: SelfAttentionWeights) -> Drawn:
    """Every other token zero."""
    fewer = latents.clone()
    fewer[..., ::2, :] = 0
    return fewer, weights
