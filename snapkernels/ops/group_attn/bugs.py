"""Seeded bugs of the absorbed kernels, each of which turns a small case red."""

from snapkernels.spec import Mutant


def _triton_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the Triton backend, in kernels/<module>.py."""
    return Mutant(name=name, backend="triton", module=module, find=find, replace=replace)


_TRITON = (
    _triton_bug("scale 1 % high", "absorbed", "-0.5 * LOG2_E", "-0.5 * LOG2_E * 1.01"),
    _triton_bug("mean left in float32 scores", "triton_scores", "x_MC -= mean_M[:, None]", "pass"),
    _triton_bug(
        "mean left in 16-bit scores",
        "triton_scores",
        "product_MS -= mean_M[:, None] * sums_S[None, :]",
        "pass",
    ),
    _triton_bug(
        "latents of the second piece from 0",
        "triton_scores",
        "h_S, l_S = h + s_S // PIECE, first + s_S",
        "h_S, l_S = h + s_S // PIECE, s_S",
    ),
)
_TRITON_READ = (
    _triton_bug(
        "groups swapped", "triton_token_sums", "* groups + g) *", "* groups + groups - 1 - g) *"
    ),
    _triton_bug(
        "last block dropped", "triton_token_sums", "in range(blocks):", "in range(blocks - 1):"
    ),
    _triton_bug(
        "blocks not at one maximum", "triton_token_sums", "of_block_J - most_J", "0 * most_J"
    ),
    _triton_bug(
        "means left in the average", "triton_token_sums", "sum_JD -= moment_J[:, None]", "pass"
    ),
    _triton_bug(
        "first token of each block dropped",
        "triton_scores",
        "m_read_M = m_M",
        "m_read_M = m_M & (tl.arange(0, BLOCK_M) > 0)",
    ),
    _triton_bug(
        "padding counted", "triton_scores", "m_read_M = m_M", "m_read_M = m_M | (mean_M == 0)"
    ),
    _triton_bug("mask ignored", "triton_scores", "other=0) != 0", "other=0) >= 0"),
    _triton_bug(
        "nothing to read gives v's bias", "triton_latents", "(readable_R != 0)", "(r_R >= 0)"
    ),
    _triton_bug("residual left out", "triton_latents", "residual=residual_RD.contiguous(),", ""),
)
_TRITON_WRITE = (
    _triton_bug(
        "groups swapped",
        "triton_update",
        "p_values += g * COLUMNS",
        "p_values += (tl.num_programs(0) // parts // tiles - 1 - g) * COLUMNS",
    ),
    _triton_bug(
        "last columns dropped",
        "triton_update",
        "range(0, COLUMNS, BLOCK_J)",
        "range(0, COLUMNS - COLUMNS % BLOCK_J, BLOCK_J)",
    ),
    _triton_bug("padding counted", "triton_scores", "mask=m_S, other=-1e30", "mask=m_S, other=0.0"),
    _triton_bug(
        "score bias left out", "triton_latents", "p_bias + j_R, bias_R", "p_bias + j_R, 0 * bias_R"
    ),
    _triton_bug(
        "residual left out", "triton_update", "sum_MD += tl.load(p_x", "sum_MD += 0 * tl.load(p_x"
    ),
)


def _backward_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the absorbed backward, in kernels/<module>.py."""
    return Mutant(
        name=name, backend="triton", module=module, find=find, replace=replace, backward=True
    )


_BACKWARD = (
    _backward_bug(
        "patches' gradient with A of the first group",
        "triton_patch_grads",
        "p_A + g * COLUMNS * DIM",
        "p_A",
    ),
    _backward_bug(
        "LayerNorm's mean of the gradient left in",
        "triton_patch_grads",
        "sum_MD -= (ones_M / DIM)[:, None]",
        "pass",
    ),
    _backward_bug(
        "LayerNorm's second term left out",
        "triton_patch_grads",
        "(rstd_M * norms_M / DIM)",
        "(0 * norms_M)",
    ),
    _backward_bug(
        "A's gradient from the last tile alone",
        "triton_token_sums",
        "tl.dot(tl.trans(P_MJ), x_MD, sum_JD, ",
        "tl.dot(tl.trans(P_MJ), x_MD, ",
    ),
    _backward_bug(
        "bias left out of a matrix's gradient",
        "triton_weight_grads",
        "+ d_shifted_I[:, None] * shift_C[None, :]",
        "",
    ),
    _backward_bug(
        "gain left out of a matrix's gradient",
        "triton_weight_grads",
        "d_scaled_IC * gain_C[None, :]",
        "d_scaled_IC * scale",
    ),
    _backward_bug(
        "gain's gradient of the first rows only",
        "triton_weight_grads",
        "tl.sum(d_scaled_IC * weight_IC, axis=0)",
        "tl.sum(d_scaled_IC * weight_IC * (i_I < 4)[:, None], axis=0)",
    ),
    _backward_bug(
        "shift's gradient of the first rows only",
        "triton_weight_grads",
        "tl.sum(d_shifted_I[:, None] * weight_IC, axis=0)",
        "tl.sum(d_shifted_I[:, None] * weight_IC * (i_I < 4)[:, None], axis=0)",
    ),
    _backward_bug(
        "latents' gradient without the gain",
        "triton_weight_grads",
        "scaled_IC = weight_IC * gain_C[None, :]",
        "scaled_IC = weight_IC * scale",
    ),
)
_BACKWARD_READ = (
    _backward_bug("delta left out", "triton_score_grads", "(dP_MS - delta_S[None, :])", "dP_MS"),
    _backward_bug(
        "patches' gradient with W of the first group",
        "triton_patch_grads",
        "p_W + g * COLUMNS * DIM",
        "p_W",
    ),
    _backward_bug(
        "gradient of v's bias lost",
        "absorbed_backward",
        "v_bias=d_v_bias_I",
        "v_bias=0 * d_v_bias_I",
    ),
    _backward_bug(
        "what has nothing to read has a gradient",
        "absorbed_backward",
        "d_heads_RI *= readable_R[:, None]",
        "pass",
    ),
    _backward_bug(
        "residual left out of the latents' gradient",
        "absorbed_backward",
        "(dz_RD + dy_RD)",
        "dz_RD",
    ),
)
_BACKWARD_WRITE = (
    _backward_bug("delta left out", "triton_score_grads", "- delta_MH[:, :, None]", ""),
    _backward_bug(
        "gradient of the score bias lost",
        "triton_score_grads",
        "tl.sum(dS_MS, axis=0)",
        "0 * tl.sum(dS_MS, axis=0)",
    ),
    _backward_bug(
        "shift left out of the latents' gradient",
        "triton_weight_grads",
        "tl.sum(weight_IC * shift_C[None, :], axis=1)",
        "tl.sum(0 * weight_IC, axis=1)",
    ),
    _backward_bug(
        "standard deviation left out", "triton_score_grads", "dS_MS *= rstd_M[:, None]", "pass"
    ),
    _backward_bug(
        "gradient of the output not added", "triton_patch_grads", "sum_MD += dy_MD", "pass"
    ),
    _backward_bug(
        "last tile dropped of the gradient of o's bias",
        "triton_patch_grads",
        "dy_sums.sum(0)",
        "dy_sums[:-1].sum(0)",
    ),
)


def _cuda_bug(name: str, file: str, find: str, replace: str) -> Mutant:
    """A bug of the CUDA backend, in csrc/group_attn/<file>.cuh."""
    path = f"group_attn/{file}.cuh"
    return Mutant(name=name, backend="cuda", file=path, find=find, replace=replace)


_CUDA_READ = (
    _cuda_bug(
        "blocks not at one maximum",
        "group_read_average",
        "power_pair(next[0] - top.x)",
        "power_pair(0)",
    ),
    _cuda_bug(
        "means left in", "group_read_average", "fmaf(pair[0], scale, -mean)", "pair[0] * scale"
    ),
    _cuda_bug(
        "last tile dropped",
        "group_read_weights",
        "if (token < given.of.tokens) {",
        "if (token + kScoreTokens < given.of.tokens) {",
    ),
    _cuda_bug(
        "weights of the first group",
        "group_read_average",
        "group, ring.full());",
        "0, ring.full());",
    ),
)
_CUDA_WRITE = (
    _cuda_bug(
        "values of the first group",
        "group_write",
        "channel + rank * 64, column, group)",
        "channel + rank * 64, column, 0)",
    ),
    _cuda_bug("mean left in", "token_scores", "-moments.mean[i] * moments.rstd[i]", "0"),
    _cuda_bug("score bias left out", "token_scores", "i % 2 ? two.w : two.y", "0"),
    _cuda_bug("residual left out", "group_write", " + bf16_low(olds[b])", ""),
    _cuda_bug(
        "a head's sum over half of its lanes",
        "token_scores",
        "__shfl_xor_sync(~0u, sum[i], 2)",
        "0",
    ),
)


def _cuda_backward_bug(
    name: str, find: str, replace: str, *, file: str | None = None, module: str | None = None
) -> Mutant:
    """A bug of CUDA's backward, in csrc/group_attn/<file>.cuh or kernels/<module>.py."""
    path = None if file is None else f"group_attn/{file}.cuh"
    return Mutant(
        name=name,
        backend="cuda",
        file=path,
        module=module,
        find=find,
        replace=replace,
        backward=True,
    )


_CUDA_BACKWARD = (
    _cuda_backward_bug(
        "LayerNorm's mean of the gradient left in",
        "moments.mean[i] * slope[i] - over_row(found.u[i]) / width",
        "moments.mean[i] * slope[i]",
        file="score_grads",
    ),
    _cuda_backward_bug(
        "LayerNorm's second term left out",
        "moments.rstd[i] * over_row(found.product[i]) / width",
        "0",
        file="score_grads",
    ),
    _cuda_backward_bug(
        "means left in A's gradient", "- moment_J[:, None]", "", module="triton_sum_ends"
    ),
)
_CUDA_BACKWARD_READ = (
    _cuda_backward_bug(
        "means not kept",
        "given.mean[at] = found.x",
        "given.mean[at] = 0",
        file="group_read_weights",
    ),
    _cuda_backward_bug("delta left out", "kLog2 * line.w,", "0,", file="group_read_grads"),
    _cuda_backward_bug(
        "patches' gradient with A and W of the first group",
        "(group * kGroupColumns + column) / 32",
        "column / 32",
        file="patch_grads",
    ),
    _cuda_backward_bug(
        "first tile dropped of A's gradient",
        "torch.bmm(dS_GNJ.mT, x_GNC,",
        "torch.bmm(dS_GNJ[:, 128:].mT, x_GNC[:, 128:],",
        module="cuda_backward",
    ),
    _cuda_backward_bug(
        "log of the sum without its largest score",
        "most + log2f(sum)",
        "log2f(sum)",
        file="group_read_average",
    ),
)
_CUDA_BACKWARD_WRITE = (
    _cuda_backward_bug(
        "delta left out", "(product[0] - delta[i])", "product[0]", file="group_write_backward"
    ),
    _cuda_backward_bug(
        "gradient of the score bias with standard deviations",
        "(row == 1) * reciprocal_fast(two.y)",
        "(row == 1)",
        file="score_grads",
    ),
    _cuda_backward_bug(
        "gradient of the output not added",
        "two.x + bf16_low(dy)",
        "two.x",
        file="group_write_backward",
    ),
    _cuda_backward_bug(
        "first tile dropped of the gradient of o's bias",
        "dy_sums.sum(0)",
        "dy_sums[1:].sum(0)",
        module="cuda_backward",
    ),
    _cuda_backward_bug(
        "values' gradient with columns as they lie",
        "+ place_in_order(j_J)",
        "+ j_J",
        module="triton_sum_ends",
    ),
)

READ = (
    *_TRITON,
    *_TRITON_READ,
    *_BACKWARD,
    *_BACKWARD_READ,
    *_CUDA_READ,
    *_CUDA_BACKWARD,
    *_CUDA_BACKWARD_READ,
)
WRITE = (
    *_TRITON,
    *_TRITON_WRITE,
    *_BACKWARD,
    *_BACKWARD_WRITE,
    *_CUDA_WRITE,
    *_CUDA_BACKWARD,
    *_CUDA_BACKWARD_WRITE,
)
