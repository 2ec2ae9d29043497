"""Seeded bugs of the absorbed kernels, each of which turns a small case red."""

from snapkernels.spec import Mutant


def _triton_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the Triton backend, in kernels/triton_<module>.py."""
    file = f"triton_{module}"
    return Mutant(name=name, backend="triton", module=file, find=find, replace=replace)


_TRITON = (
    _triton_bug("scale 1 % high", "kernels", "-0.5 * LOG2_E", "-0.5 * LOG2_E * 1.01"),
    _triton_bug("mean left in float32 scores", "scores", "x_MC -= mean_M[:, None]", "pass"),
    _triton_bug(
        "mean left in 16-bit scores", "scores", "product_MS -= mean_M[:, None] * sums_S[None, :]",
        "pass",
    ),
    _triton_bug(
        "latents of the second piece from 0", "scores", "h_S, l_S = h + s_S // PIECE, first + s_S",
        "h_S, l_S = h + s_S // PIECE, s_S",
    ),
)  # fmt: skip
_TRITON_READ = (
    _triton_bug("groups swapped", "context", "* groups + g) *", "* groups + groups - 1 - g) *"),
    _triton_bug("last block dropped", "context", "in range(blocks):", "in range(blocks - 1):"),
    _triton_bug("blocks not at one maximum", "context", "of_block_J - most_J", "0 * most_J"),
    _triton_bug("means left in the context", "context", "sum_JD -= moment_J[:, None]", "pass"),
    _triton_bug(
        "first token of each block dropped", "scores", "m_read_M = m_M",
        "m_read_M = m_M & (tl.arange(0, BLOCK_M) > 0)",
    ),
    _triton_bug("padding counted", "scores", "m_read_M = m_M", "m_read_M = m_M | (mean_M == 0)"),
    _triton_bug("mask ignored", "scores", "other=0) != 0", "other=0) >= 0"),
    _triton_bug("nothing to read gives v's bias", "latents", "(readable_R != 0)", "(r_R >= 0)"),
    _triton_bug("residual left out", "latents", "residual=residual_RD.contiguous(),", ""),
)  # fmt: skip
_TRITON_WRITE = (
    _triton_bug(
        "groups swapped", "update", "p_values += g * COLUMNS",
        "p_values += (tl.num_programs(0) // parts // tiles - 1 - g) * COLUMNS",
    ),
    _triton_bug(
        "last columns dropped", "update", "range(0, COLUMNS, BLOCK_J)",
        "range(0, COLUMNS - COLUMNS % BLOCK_J, BLOCK_J)",
    ),
    _triton_bug("padding counted", "scores", "mask=m_S, other=-1e30", "mask=m_S, other=0.0"),
    _triton_bug(
        "score bias left out", "latents", "p_bias + j_R, bias_R", "p_bias + j_R, 0 * bias_R"
    ),
    _triton_bug(
        "residual left out", "update", "sum_MD += tl.load(p_x", "sum_MD += 0 * tl.load(p_x"
    ),
)  # fmt: skip


def _cuda_bug(name: str, file: str, find: str, replace: str) -> Mutant:
    """A bug of the CUDA backend, in csrc/group_attn/<file>.cuh."""
    path = f"group_attn/{file}.cuh"
    return Mutant(name=name, backend="cuda", file=path, find=find, replace=replace)


_CUDA_READ = (
    _cuda_bug(
        "blocks not at one maximum", "group_read_average", "power_pair(next[0] - top.x)",
        "power_pair(0)",
    ),
    _cuda_bug(
        "means left in", "group_read_average", "fmaf(pair[0], scale, -mean)", "pair[0] * scale"
    ),
    _cuda_bug(
        "last tile dropped", "group_read_weights", "if (token < given.of.tokens) {",
        "if (token + kScoreTokens < given.of.tokens) {",
    ),
    _cuda_bug(
        "weights of the first group", "group_read_average", "group, ring.full());",
        "0, ring.full());",
    ),
)  # fmt: skip
_CUDA_WRITE = (
    _cuda_bug(
        "values of the first group", "group_write", "channel + rank * 64, column, group)",
        "channel + rank * 64, column, 0)",
    ),
    _cuda_bug("mean left in", "group_write", "-moments.mean[i] * moments.rstd[i]", "0"),
    _cuda_bug("score bias left out", "group_write", "i % 2 ? two.w : two.y", "0"),
    _cuda_bug("residual left out", "group_write", " + bf16_low(olds[b])", ""),
    _cuda_bug(
        "a head's sum over half of its lanes", "group_write", "__shfl_xor_sync(~0u, sum[i], 2)", "0"
    ),
)  # fmt: skip

READ = (*_TRITON, *_TRITON_READ, *_CUDA_READ)
WRITE = (*_TRITON, *_TRITON_WRITE, *_CUDA_WRITE)
