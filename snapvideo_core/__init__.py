"""Snap Video's models and diffusion, thin, on the public functions of snapkernels."""

from snapvideo_core.capture import CapturedFIT
from snapvideo_core.checkpoint import CheckpointError, load_model, save_model
from snapvideo_core.config import PRESETS, FITConfig
from snapvideo_core.diffusion import Diffusion, EDMDiffusion, SnapDiffusion
from snapvideo_core.fit import FIT, Conditioning
from snapvideo_core.sampler import SelfConditionedDenoiser, integrate, sample, sigma_schedule
from snapvideo_core.training import sample_sigma, training_loss
from snapvideo_core.video import Clip, VideoError, read_clip

__all__ = [
    "FIT",
    "PRESETS",
    "CapturedFIT",
    "CheckpointError",
    "Clip",
    "Conditioning",
    "Diffusion",
    "EDMDiffusion",
    "FITConfig",
    "SelfConditionedDenoiser",
    "SnapDiffusion",
    "VideoError",
    "integrate",
    "load_model",
    "read_clip",
    "sample",
    "sample_sigma",
    "save_model",
    "sigma_schedule",
    "training_loss",
]
