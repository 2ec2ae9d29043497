"""SnapKernels: the ops of Snap Video's FIT transformers, as drop-ins for any PyTorch model."""

from snapkernels.modules import FeedForward, GroupRead, GroupWrite, LatentAttention
from snapkernels.ops.feed_forward.op import feed_forward
from snapkernels.ops.feed_forward.weights import FeedForwardWeights
from snapkernels.ops.group_attn.op import group_read, group_write
from snapkernels.ops.group_attn.weights import CrossAttentionWeights
from snapkernels.ops.latent_attn.op import latent_attention
from snapkernels.ops.latent_attn.weights import SelfAttentionWeights
from snapkernels.ops.patch.op import patchify, unpatchify

__all__ = [
    "CrossAttentionWeights",
    "FeedForward",
    "FeedForwardWeights",
    "GroupRead",
    "GroupWrite",
    "LatentAttention",
    "SelfAttentionWeights",
    "feed_forward",
    "group_read",
    "group_write",
    "latent_attention",
    "patchify",
    "unpatchify",
]
__version__ = "0.1.0"
