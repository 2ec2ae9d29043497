"""Seeded bugs of latent_attention_fp8, each of which turns a small case red."""

from snapkernels.spec import Mutant


def _eager_bug(name: str, find: str, replace: str) -> Mutant:
    """A bug of the eager backend."""
    return Mutant(name=name, backend="eager", find=find, replace=replace)


def _triton_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the Triton backend, in kernels/<module>.py."""
    return Mutant(name=name, backend="triton", module=module, find=find, replace=replace)


def _cuda_bug(name: str, file: str, find: str, replace: str) -> Mutant:
    """A bug of the CUDA backend, in csrc/<file>."""
    return Mutant(name=name, backend="cuda", file=file, find=find, replace=replace)


_CORE, _HEADS = "latent_attn/latent_core.cuh", "latent_attn/heads_end.cuh"
_CUDA = (
    _cuda_bug("residual dropped", "latent_bindings.cpp", "last.residual = latents.data_ptr();", ""),
    _cuda_bug("P's scale lost", _CORE, "grown[i] = exp2_fast(unit[i] - now);", "grown[i] = 1;"),
    _cuda_bug(
        "values by the first head's scale",
        _CORE,
        "v_scale = of.v_scale[tile + i];",
        "v_scale = of.v_scale[video * tiles + i];",
    ),
    _cuda_bug(
        "keys by the scale of the tile before",
        _CORE,
        "k_scale = of.k_scale[tile + i],",
        "k_scale = of.k_scale[tile + max(i - 1, 0)],",
    ),
    _cuda_bug(
        "scale of the query before",
        _CORE,
        "of.q_scale[row + min(first + i, of.length - 1)]",
        "of.q_scale[row + max(min(first + i, of.length - 1) - 1, 0)]",
    ),
    _cuda_bug(
        "tail keys counted", _CORE, "grown, scores, count, left);", "grown, scores, count, 128);"
    ),
    _cuda_bug(
        "keys of the head before",
        _CORE,
        "k, work.of.heads * kHead + column,",
        "k, work.of.heads * kHead + max(column - kHead, 0),",
    ),
    _cuda_bug(
        "values of two tokens exchanged",
        _HEADS,
        "last_bytes(rounded(low[e], inverse), rounded(low[2 + e], inverse),",
        "last_bytes(rounded(low[2 + e], inverse), rounded(low[e], inverse),",
    ),
    _cuda_bug(
        "V not transposed",
        _HEADS,
        "to + (group * 4 * kTogether + j) * tokens",
        "to + (group * 4 * kTogether + (j ^ 1)) * tokens",
    ),
    _cuda_bug(
        "a head's largest of one warp", _HEADS, "share_most(all, own + kProductScratch);", ";"
    ),
)
LATENT_ATTENTION_FP8 = (
    *_CUDA,
    _eager_bug("residual dropped", "None, None, latents_BLD, eps)", "None, None, None, eps)"),
    _eager_bug(
        "scale of the row before",
        "w.qkv_weight, w.qkv_scale, w.qkv_bias",
        "w.qkv_weight, w.qkv_scale.roll(1), w.qkv_bias",
    ),
    _eager_bug("keys of the head before", "attention(q, k, v)", "attention(q, k.roll(1, 1), v)"),
    _eager_bug("values of the key before", "attention(q, k, v)", "attention(q, k, v.roll(1, 2))"),
    _eager_bug("q in the place of v", "attention(q, k, v)", "attention(q, k, q)"),
    _eager_bug("eps left at the default", "w.norm_bias, None, eps)", "w.norm_bias, None, 1e-6)"),
    _triton_bug(
        "residual dropped",
        "triton_backend",
        "None, None, latents_BLD, eps)",
        "None, None, None, eps)",
    ),
    _triton_bug(
        "P's scale lost",
        "triton_core",
        "* P_MOST + TO_INTEGER",
        "+ TO_INTEGER",
    ),
    _triton_bug(
        "P's shift not made good",
        "triton_core",
        "of_tile_QE += P_SHIFT * tl.load(p_sum_E)[None, :]",
        "",
    ),
    _triton_bug(
        "P of a tile added up as if its largest were all tiles'",
        "triton_core",
        "tl.exp2(highest_Q - most_Q)",
        "tl.exp2(most_Q - most_Q)",
    ),
    _triton_bug(
        "P by the largest of all tiles so far",
        "triton_core",
        "highest_Q = tl.max(scores_QK, axis=1)",
        "highest_Q = tl.maximum(most_Q, tl.max(scores_QK, axis=1))",
    ),
    _triton_bug(
        "scales of the first head",
        "triton_core",
        "p_scale = p_scales + head * tiles * 2",
        "p_scale = p_scales + head // HEADS * HEADS * tiles * 2",
    ),
    _triton_bug("scales of the first tile", "triton_core", "p_scale += 2", "p_scale += 0"),
    _triton_bug(
        "scale of the query before",
        "triton_core",
        "q_scale_Q = int8_scale(tl.max(magnitude_bits(q_QE), axis=1))",
        "q_scale_Q = int8_scale(tl.max(magnitude_bits(tl.load(p_QE - 3 * INNER,"
        " mask=m_QE & (row_Q > 0)[:, None], other=1.0).to(tl.float32)), axis=1))",
    ),
    _triton_bug(
        "tail keys counted",
        "triton_core",
        'tl.where((k_K < latents - first)[None, :], scores_QK, float("-inf"))',
        "scores_QK",
    ),
    _triton_bug(
        "V read as if it were not transposed",
        "triton_core",
        "e_E[:, None] * BLOCK_K + k_K[None, :]",
        "e_E[:, None] + k_K[None, :] * BLOCK_E",
    ),
    _triton_bug(
        "values of two keys exchanged",
        "triton_core",
        "e_E[:, None] * BLOCK_K + k_K[None, :]",
        "e_E[:, None] * BLOCK_K + (k_K ^ 1)[None, :]",
    ),
    _triton_bug(
        "largest value with its sign",
        "triton_int8",
        "x.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
        "tl.maximum(x, 0.0).to(tl.int32, bitcast=True)",
    ),
)
