"""The cases of linear and feed_forward, which those of fp8 share."""

from typing import Any

import torch

from snapkernels.spec import Case, Tier

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SMALL = (BF16, FP32)


def _outliers(tokens: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    """Every 17th channel 50 times as large, as trained models have them."""
    louder = tokens.clone()
    louder[..., ::17] *= 50
    return louder, *others


def _loud_gains(tokens: torch.Tensor, weights: Any, *others: Any) -> tuple[Any, ...]:
    """Likewise of the normed tokens alone: next to loud ones in the residual the branch is lost."""
    louder = weights.norm_weight.clone()
    louder[::17] *= 50
    return tokens, weights._replace(norm_weight=louder), *others


def _zero_rows(tokens: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    """Every other token zero."""
    fewer = tokens.clone()
    fewer[..., ::2, :] = 0
    return fewer, *others


def _positive_product(tokens: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    """No sum in which roundings of large partial ones could cancel."""
    return tokens.abs(), weight.abs(), *others


def _positive_hidden(tokens: torch.Tensor, weights: Any, *others: Any) -> tuple[Any, ...]:
    """Likewise of fc2: GELU of what is well above 0."""
    positive = {"fc1_bias": weights.fc1_bias.abs() + 3, "fc2_weight": weights.fc2_weight.abs()}
    return tokens, weights._replace(**positive), *others


def linear_cases() -> tuple[Case, ...]:
    """The cases of a linear layer."""

    def case(
        name: str,
        tier: Tier,
        tokens: tuple[int, ...],
        widths: tuple[int, int],
        *,
        norm: bool = False,
        residual: bool = False,
        eps: float = 1e-6,
        **more: Any,
    ) -> Case:
        sizes = {"...": tokens, "D": widths[0], "N": widths[1]}
        options = {"norm_weight": norm, "norm_bias": norm, "residual": residual, "eps": eps}
        return Case(name=name, tier=tier, sizes=sizes, options=options, **more)

    def large(name: str, tokens: tuple[int, ...], widths: tuple[int, int], **given: bool) -> Case:
        return case(name, "paper", tokens, widths, dtypes=(BF16,), **given)

    return (
        case("odd", "cpu", (2, 3, 5), (12, 20), norm=True, residual=True, dtypes=(*SMALL, FP64)),
        # One past a tile of 128 tokens.
        case("ragged", "cpu", (129,), (36, 72), norm=True),
        case("one-token", "cpu", (), (24, 40), residual=True),
        case("bare", "cpu", (4, 6), (20, 33)),
        # Rows of e4m3 that begin at even bytes only.
        case("two-over-fours", "cpu", (5,), (10, 18), norm=True),
        # Next to the variance of the inputs, 1e-6 is nothing.
        case("large-eps", "cpu", (3, 7), (16, 24), norm=True, eps=0.1),
        case("outliers", "cpu", (2, 9), (51, 32), norm=True, change=_outliers),
        case("loud-tokens", "cpu", (2, 9), (51, 32), residual=True, change=_outliers),
        case("zero-rows", "cpu", (3, 6), (32, 16), residual=True, change=_zero_rows),
        # Widths that compiled kernels take, and counts of tokens around their tiles.
        case("tiles", "cpu", (129,), (256, 256), norm=True, residual=True, dtypes=(BF16,)),
        case("one-row", "gpu", (1,), (256, 512), norm=True, dtypes=(BF16,)),
        case("large-eps-tiles", "gpu", (90,), (256, 256), norm=True, eps=0.1, dtypes=(BF16,)),
        case(
            "outlier-tiles", "gpu", (90,), (512, 256), norm=True, dtypes=(BF16,), change=_outliers
        ),
        case(
            "loud-tiles", "gpu", (90,), (256, 256), residual=True, dtypes=(BF16,), change=_outliers
        ),
        case("zero-row-tiles", "gpu", (90,), (256, 256), dtypes=(BF16,), change=_zero_rows),
        case("ragged-tiles", "gpu", (3, 100), (768, 256), residual=True, dtypes=(BF16,)),
        case("wide-tiles", "gpu", (513,), (512, 1536), norm=True, residual=True, dtypes=(BF16,)),
        case("bare-tiles", "gpu", (300,), (1024, 768), dtypes=(BF16,)),
        # An accumulator of fewer bits than float32 shows.
        case("long", "gpu", (64,), (2048, 256), dtypes=(BF16,), change=_positive_product),
        case("positive", "gpu", (64,), (1024, 256), dtypes=(BF16,), change=_positive_product),
        # Few tiles for many multiprocessors, which share out what each is summed over.
        case("deep", "gpu", (64,), (4096, 256), norm=True, residual=True, dtypes=(BF16,)),
        # Blocks of fewer columns for few tiles: alone, of a LayerNorm's rows, and split as well.
        case("narrow-tiles", "gpu", (300,), (2048, 768), residual=True, dtypes=(BF16,)),
        case("narrow-tiles-normed", "gpu", (90,), (1280, 1536), norm=True, dtypes=(BF16,)),
        case("narrow-tiles-deep", "gpu", (257,), (3840, 768), residual=True, dtypes=(BF16,)),
        # Two tiles of a cluster, one after the other.
        case("narrow-tiles-twice", "gpu", (1536,), (1536, 3072), residual=True, dtypes=(BF16,)),
        large("qkv-3.9b", (16, 768), (3072, 9216), norm=True),
        large("out-3.9b", (16, 768), (3072, 3072), residual=True),
        large("qkv-3.9b-b1", (1, 768), (3072, 9216), norm=True),
        large("out-3.9b-b1", (1, 768), (3072, 3072), residual=True),
        large("qkv-500m-b64", (64, 512), (1024, 3072), norm=True),
        large("out-500m-b64", (64, 512), (1024, 1024), residual=True),
    )


def feed_forward_cases(**options: Any) -> tuple[Case, ...]:
    """The cases of a feed-forward sublayer, with `options` beside the LayerNorm's eps."""

    def case(
        name: str,
        tier: Tier,
        tokens: tuple[int, ...],
        widths: tuple[int, int],
        *,
        eps: float = 1e-6,
        **more: Any,
    ) -> Case:
        sizes = {"...": tokens, "D": widths[0], "F": widths[1]}
        return Case(name=name, tier=tier, sizes=sizes, options=options | {"eps": eps}, **more)

    def large(name: str, tokens: tuple[int, ...], widths: tuple[int, int]) -> Case:
        return case(name, "paper", tokens, widths, dtypes=(BF16,))

    return (
        case("odd", "cpu", (2, 3, 5), (12, 40), dtypes=(*SMALL, FP64)),
        # One past a tile of 128 tokens.
        case("ragged", "cpu", (129,), (36, 72)),
        case("one-token", "cpu", (), (24, 96)),
        case("narrow-hidden", "cpu", (4, 6), (20, 3)),
        # Next to the variance of the inputs, 1e-6 is nothing.
        case("large-eps", "cpu", (3, 7), (16, 64), eps=0.1),
        case("outliers", "cpu", (2, 9), (51, 68), change=_loud_gains),
        case("zero-rows", "cpu", (3, 6), (32, 64), change=_zero_rows),
        # Widths that compiled kernels take, and counts of tokens around their tiles.
        case("tiles", "cpu", (129,), (256, 512), dtypes=(BF16,)),
        case("one-row", "gpu", (1,), (256, 1024), dtypes=(BF16,)),
        case("large-eps-tiles", "gpu", (90,), (256, 512), eps=0.1, dtypes=(BF16,)),
        case("outlier-tiles", "gpu", (90,), (512, 1024), dtypes=(BF16,), change=_loud_gains),
        case("zero-row-tiles", "gpu", (90,), (256, 512), dtypes=(BF16,), change=_zero_rows),
        case("ragged-tiles", "gpu", (3, 100), (768, 1536), dtypes=(BF16,)),
        case("many-tiles", "gpu", (513,), (512, 2048), dtypes=(BF16,)),
        # An accumulator of fewer bits than float32 shows.
        case("long", "gpu", (64,), (256, 2048), dtypes=(BF16,), change=_positive_hidden),
        # Few tiles for many multiprocessors, which share out what each is summed over.
        case("deep", "gpu", (300,), (256, 4096), dtypes=(BF16,)),
        large("patch-up", (1, 32, 4608), (1024, 4096)),
        large("3.9b", (16, 768), (3072, 12288)),
        large("3.9b-b1", (1, 768), (3072, 12288)),
        large("500m-b64", (64, 512), (1024, 4096)),
        large("500m-patch-b64", (64, 2560), (768, 3072)),
    )
