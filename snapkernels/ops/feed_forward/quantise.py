"""Matrices as e4m3 rows with a scale each: weights ahead of time, tokens as eager does it."""

import torch

from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights

LARGEST = 448.0  # of e4m3


@torch.no_grad()
def quantise_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row m as scale[m] times e4m3 numbers, the largest of which is 448 in magnitude.

    scale[m] = max |matrix[m]| / 448, and the numbers are matrix[m] / scale[m] rounded to nearest,
    ties to even: within 1/16 of themselves down to 2^-6 scale[m], within 2^-10 scale[m] below. A
    row of zeros has scale 0. A row with a NaN or an infinity has it for scale, and stays not finite
    when it is multiplied out: nothing saturates unseen. Nothing waits for the device.

    Args:
        matrix: (M, K), floating point, with at least one column.

    Returns:
        (M, K) float8_e4m3fn, contiguous, and (M,) float32; neither has a gradient.

    Raises:
        ValueError: it is not such a matrix.
    """
    if not (isinstance(matrix, torch.Tensor) and matrix.is_floating_point() and matrix.dim() == 2):
        got = type(matrix).__name__
        if isinstance(matrix, torch.Tensor):
            got = f"shape {tuple(matrix.shape)}, {matrix.dtype}"
        raise ValueError(f"quantise_rows: matrix must be (M, K), floating point, got {got}")
    if matrix.shape[1] == 0:
        raise ValueError("quantise_rows: matrix must have at least one column, got K = 0")
    scale_M1 = matrix.abs().amax(1, keepdim=True).float() / LARGEST
    scaled = matrix.contiguous() / torch.where(scale_M1 == 0, 1, scale_M1)
    # Only a scale that is not normal, and so has few bits, lets a number pass 448.
    rounded = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return rounded, scale_M1[:, 0]


@torch.no_grad()
def quantise_feed_forward(weights: FeedForwardWeights) -> Fp8FeedForwardWeights:
    """The parameters as `feed_forward_fp8` takes them, on the same device, without gradients.

    Copies, all of them: `hidden_bound` holds for the biases as they are now.

    Args:
        weights: see `FeedForwardWeights`; of the dtype that the tokens will have.

    Raises:
        ValueError: a matrix that `quantise_rows` does not take.
    """
    fc1_weight, fc1_scale = quantise_rows(weights.fc1_weight)
    fc2_weight, fc2_scale = quantise_rows(weights.fc2_weight)
    longest = (fc1_weight.float().norm(dim=1) * fc1_scale).amax()
    return Fp8FeedForwardWeights(
        norm_weight=weights.norm_weight.detach().clone(),
        norm_bias=weights.norm_bias.detach().clone(),
        fc1_weight=fc1_weight,
        fc1_scale=fc1_scale,
        fc1_bias=weights.fc1_bias.detach().clone(),
        hidden_bound=torch.stack([longest, weights.fc1_bias.abs().amax().float()]),
        fc2_weight=fc2_weight,
        fc2_scale=fc2_scale,
        fc2_bias=weights.fc2_bias.detach().clone(),
    )
