"""SnapKernels: the ops of Snap Video's FIT transformers, as drop-ins for any PyTorch model."""

from snapkernels.modules import FeedForward, GroupRead, GroupWrite, LatentAttention
from snapkernels.modules_fp8 import (
    Fp8FeedForward,
    Fp8GroupRead,
    Fp8GroupWrite,
    Fp8LatentAttention,
)
from snapkernels.ops.feed_forward.op import feed_forward, feed_forward_fp8, linear, linear_fp8
from snapkernels.ops.feed_forward.quantise import quantise_feed_forward, quantise_rows
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights
from snapkernels.ops.group_attn.op import group_read, group_write
from snapkernels.ops.group_attn.weights import CrossAttentionWeights
from snapkernels.ops.head.op import head, head_loss, head_mix, video_mix
from snapkernels.ops.head.weights import HeadWeights
from snapkernels.ops.latent_attn.op import latent_attention, latent_attention_fp8
from snapkernels.ops.latent_attn.quantise import quantise_latent_attention
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights, SelfAttentionWeights
from snapkernels.ops.noise.op import forward_process
from snapkernels.ops.patch.op import patchify, unpatchify
from snapkernels.ops.stem.op import stem
from snapkernels.ops.stem.weights import StemWeights
from snapkernels.recipes import RECIPES, Recipe, quantise

__all__ = [
    "RECIPES",
    "CrossAttentionWeights",
    "FeedForward",
    "FeedForwardWeights",
    "Fp8FeedForward",
    "Fp8FeedForwardWeights",
    "Fp8GroupRead",
    "Fp8GroupWrite",
    "Fp8LatentAttention",
    "Fp8SelfAttentionWeights",
    "GroupRead",
    "GroupWrite",
    "HeadWeights",
    "LatentAttention",
    "Recipe",
    "SelfAttentionWeights",
    "StemWeights",
    "feed_forward",
    "feed_forward_fp8",
    "forward_process",
    "group_read",
    "group_write",
    "head",
    "head_loss",
    "head_mix",
    "latent_attention",
    "latent_attention_fp8",
    "linear",
    "linear_fp8",
    "patchify",
    "quantise",
    "quantise_feed_forward",
    "quantise_latent_attention",
    "quantise_rows",
    "stem",
    "unpatchify",
    "video_mix",
]
__version__ = "0.1.0"
