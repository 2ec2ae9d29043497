"""Table 2 of the paper: ms/video/GPU on A100, one denoiser evaluation, one training step."""

PAPER_A100 = {
    "model/unet-85m/infer": 49.6,
    "model/unet-85m/train": 133.2,
    "model/unet-284m/infer": 105.1,
    "model/unet-284m/train": 230.3,
    "model/500m/infer": 23.4,
    "model/500m/train": 69.5,
    "model/3.9b/infer": 130.4,
    "model/3.9b/train": 526.0,
}
# The ratios of these that the paper speaks of: the first case's time over the second's.
PAPER_RATIOS = {
    "U-Net 284M / FIT 500M, training": ("model/unet-284m/train", "model/500m/train"),
    "U-Net 284M / FIT 500M, inference": ("model/unet-284m/infer", "model/500m/infer"),
    "FIT 3.9B / U-Net 284M, inference": ("model/3.9b/infer", "model/unet-284m/infer"),
}
