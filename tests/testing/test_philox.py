"""The noise of philox.py, philox_triton.py and csrc/philox.cuh: its words, and its normals in ulp.

Words and normals are held against Python integers and float64 here, which share no code with them.
"""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from snapkernels import env
from snapkernels.philox import box_muller, kept, normals, words
from snapkernels.philox_triton import philox_normals, philox_pair, philox_words
from snapkernels.testing import record

DEVICE = "cpu" if env.INTERPRET else "cuda"
ONES = 0xFFFFFFFF
# (key, counter, words): the published vectors of Random123, the authors' library.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 2, (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 1234, 2**32, 2**63 + 12345, 2**64 - 1]


def by_hand(key, counter):
    """Philox4x32-10 in Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & ONES, a >> 32 ^ c3 ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def exact(even, odd):
    """z_0 and z_1 of arrays of words, in float64, reduced to an octant of the circle."""
    u = (even | 1).astype(np.float32).astype(np.float64) / 2**32
    r = np.sqrt(-2 * np.where(u > 0.5, np.log1p(u - 1), np.log(u)))
    octant, rest = odd >> 29, odd >> 8 & 0x1FFFFF
    angle = np.where(octant % 2, 2**21 - rest, rest) * (np.pi / 2**23)
    cosine, sine = np.cos(angle), np.sin(angle)
    across = (octant + 1) // 2 % 2 == 1
    cosine, sine = np.where(across, sine, cosine), np.where(across, cosine, sine)
    left, lower = (octant >= 2) & (octant < 6), octant >= 4
    return r * np.where(left, -cosine, cosine), r * np.where(lower, -sine, sine)


def error(z, even, odd):
    """The largest error of z (n, 2) in ulp, infinite where an exact zero is missed."""
    x = np.stack(exact(even, odd), -1)
    ulp = np.ldexp(1.0, np.frexp(x)[1] - 24)
    return np.where(x == 0, np.where(z == 0, 0, np.inf), np.abs(z - x) / ulp).max()


@pytest.fixture(scope="module")
def pairs():
    """Words (n,), (n,) as int64 arrays: edges of both, against each other, and random ones."""
    near = np.arange(-600, 601)
    octants = ((np.arange(8) << 29)[:, None] + near).reshape(-1)
    powers = ((1 << np.arange(33))[:, None] + np.arange(-3, 4)).reshape(-1)
    split = int(2 / 3 * 2**32) + near
    edges = np.concatenate([octants, powers, split]) % 2**32
    few = np.array([0, 1, 255, 256, 2**29, 2**30 - 1, 2**31, 2**32 - 257, 2**32 - 129, ONES])
    random = np.random.default_rng(0).integers(0, 2**32, (2, 1 << 17))
    first, second = np.meshgrid(few, edges)
    even = np.concatenate([first.reshape(-1), second.reshape(-1), random[0]])
    odd = np.concatenate([second.reshape(-1), first.reshape(-1), random[1]])
    return even, odd


@triton.jit
def words_kernel(p_key, p_counter, p_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    c0 = tl.load(p_counter + 4 * i, mask=m).to(tl.uint32)
    c1 = tl.load(p_counter + 4 * i + 1, mask=m).to(tl.uint32)
    c2 = tl.load(p_counter + 4 * i + 2, mask=m).to(tl.uint32)
    c3 = tl.load(p_counter + 4 * i + 3, mask=m).to(tl.uint32)
    k0, k1 = tl.load(p_key).to(tl.uint32), tl.load(p_key + 1).to(tl.uint32)
    c0, c1, c2, c3 = philox_words(k0, k1, c0, c1, c2, c3)
    tl.store(p_out + 4 * i, c0.to(tl.int64), mask=m)
    tl.store(p_out + 4 * i + 1, c1.to(tl.int64), mask=m)
    tl.store(p_out + 4 * i + 2, c2.to(tl.int64), mask=m)
    tl.store(p_out + 4 * i + 3, c3.to(tl.int64), mask=m)


@triton.jit
def pair_kernel(p_even, p_odd, p_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    even = tl.load(p_even + i, mask=i < n).to(tl.uint32)
    odd = tl.load(p_odd + i, mask=i < n).to(tl.uint32)
    z0, z1 = philox_pair(even, odd)
    tl.store(p_out + 2 * i, z0, mask=i < n)
    tl.store(p_out + 2 * i + 1, z1, mask=i < n)


@triton.jit
def normals_kernel(p_out, seed_lo, seed_hi, sample, first_block, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    z0, z1, z2, z3 = philox_normals(seed_lo, seed_hi, i.to(tl.int64) + first_block, sample)
    tl.store(p_out + 4 * i, z0)
    tl.store(p_out + 4 * i + 1, z1)
    tl.store(p_out + 4 * i + 2, z2)
    tl.store(p_out + 4 * i + 3, z3)


def triton_pairs(even, odd):
    even, odd = (torch.from_numpy(x).to(DEVICE) for x in (even, odd))
    out = torch.full((len(even), 2), float("nan"), device=DEVICE)
    pair_kernel[(triton.cdiv(len(even), 1 << 15),)](even, odd, out, len(even), 1 << 15)
    return out.cpu().numpy()


def triton_words(key, counters):
    key, counters = (torch.tensor(x, device=DEVICE) for x in (key, counters))
    out = torch.full_like(counters, -1)
    words_kernel[(triton.cdiv(len(out), 64),)](key, counters, out, len(out), 64)
    return out.cpu()


@pytest.mark.parametrize(("key", "counter", "known"), KNOWN)
def test_known_answers(key, counter, known):
    assert by_hand(key, counter) == known
    assert tuple(triton_words(key, [counter])[0].tolist()) == known
    block, sample = torch.tensor(counter, dtype=torch.uint32).view(torch.int64).split(1)
    assert tuple(words(key[0] | key[1] << 32, sample, block).flatten().tolist()) == known


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_python_integers(seed, rng):
    sample = torch.randint(2**62, (5,), generator=rng) >> torch.tensor([0, 20, 40, 60, 62])
    blocks = torch.randint(2**62, (40,), generator=rng) >> torch.arange(40)
    blocks[:3] = torch.tensor([2**32 - 1, 2**32, 2**63 - 1])
    out = words(seed, sample, blocks)
    assert out.dtype == torch.int64 and out.shape == (5, 40, 4)
    key = (seed & ONES, seed >> 32)
    counters = [
        [b & ONES, b >> 32, s & ONES, s >> 32] for s in sample.tolist() for b in blocks.tolist()
    ]
    assert out.flatten(0, 1).tolist() == [list(by_hand(key, c)) for c in counters]
    assert torch.equal(triton_words(key, counters), out.flatten(0, 1))


def test_torch_normals_are_the_equation_rounded(pairs):
    z = box_muller(torch.from_numpy(np.stack(pairs, -1))).float().numpy()
    assert np.isfinite(z).all() and error(z, *pairs) <= 0.501


def test_triton_normals_are_within_2_ulp(pairs):
    z = triton_pairs(*pairs)
    assert np.isfinite(z).all() and error(z, *pairs) < 2


@pytest.mark.parametrize("sample", [0, 1, 7, 2**31, 2**40 + 3])
@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**63 + 2**31])
def test_triton_normals_of_an_element(seed, sample):
    """Numbers whose launch is an i32, an i64, or a constant."""
    first = 2**32 - 30
    out = torch.full((256,), float("nan"), device=DEVICE)
    normals_kernel[(1,)](out, seed & ONES, seed >> 32, sample, first, 64)
    w = words(seed, torch.tensor([sample]), torch.arange(first, first + 64)).numpy().reshape(-1, 2)
    assert error(out.cpu().numpy().reshape(-1, 2), w[:, 0], w[:, 1]) < 2


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """csrc/philox.cuh as nvcc compiles it for the CPU."""
    folder = tmp_path_factory.mktemp("philox")
    (folder / "host.cu").write_text("""
#include "philox.cuh"
extern "C" void words(const uint32_t* key, const uint4* counters, uint4* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = snapkernels::philox_words({key[0], key[1]}, counters[i]);
}
extern "C" void pairs(const uint32_t* even, const uint32_t* odd, float2* out, int n) {
  for (int i = 0; i < n; ++i) out[i] = snapkernels::philox::pair(even[i], odd[i]);
}
extern "C" void normals(const uint32_t* key, uint64_t block, uint64_t sample, float4* out, int n) {
  for (int i = 0; i < n; ++i)
    out[i] = snapkernels::philox_normals({key[0], key[1]}, block + i, sample);
}
""")
    command = ["nvcc", "-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC"]
    command += ["-I", record.ROOT / "csrc", folder / "host.cu", "-o", folder / "host.so"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="no nvcc or no g++")
def test_the_cuda_header_on_the_host(host, pairs):
    def pointer(x):
        return x.ctypes.data_as(ctypes.c_void_p)

    even, odd = (x.astype(np.uint32) for x in pairs)
    z = np.full((len(even), 2), np.nan, np.float32)
    host.pairs(pointer(even), pointer(odd), pointer(z), len(even))
    assert np.isfinite(z).all() and error(z, *pairs) < 2
    if env.INTERPRET:
        # One rounding a step in both, and the same root: it is the same arithmetic, to the bit.
        assert np.array_equal(z, triton_pairs(*pairs))

    for key, counter, known in KNOWN:
        key, counter = np.array(key, np.uint32), np.array(counter, np.uint32)
        out = np.zeros(4, np.uint32)
        host.words(pointer(key), pointer(counter), pointer(out), 1)
        assert tuple(out) == known

    seed, block, sample = 2**63 + 5, 2**32 - 500, 2**33 + 1
    key = np.array([seed & ONES, seed >> 32], np.uint32)
    z = np.full((2000, 2), np.nan, np.float32)
    where = ctypes.c_uint64(block), ctypes.c_uint64(sample)
    host.normals(pointer(key), *where, pointer(z), 1000)
    w = words(seed, torch.tensor([sample]), torch.arange(block, block + 1000)).view(-1, 2).numpy()
    assert error(z, w[:, 0], w[:, 1]) < 2


def test_moments_and_neighbours():
    n = 1 << 19
    z = normals(2024, torch.tensor([0, 1]), (n,)).double()
    other = normals(2025, torch.tensor([0]), (n,)).double()
    five = 5 / n**0.5
    for x in z:
        assert abs(x.mean()) < five
        assert abs(x.var() - 1) < five * 2**0.5
        assert abs((x**3).mean()) < five * 15**0.5
        assert abs((x**4).mean() - 3) < five * 96**0.5
        for lag in range(1, 9):
            # Squares too: the two normals of a pair share their radius.
            assert abs((x[lag:] * x[:-lag]).mean()) < five
            assert abs(((x[lag:] ** 2 - 1) * (x[:-lag] ** 2 - 1)).mean()) < five * 2
    for a, b in ((z[0], z[1]), (z[0], other[0])):
        assert abs((a * b).mean()) < five
        assert not (a == b).any()


def test_a_sample_is_the_same_in_any_batch():
    shape = (3, 2, 5, 7)
    sample = torch.tensor([0, 1, 2, 2**40])
    whole = normals(5, sample, shape)
    assert whole.shape == (4, *shape) and whole.dtype == torch.float32
    assert torch.equal(
        whole, torch.cat([normals(5, sample[:2], shape), normals(5, sample[2:], shape)])
    )
    assert torch.equal(whole.flip(0), normals(5, sample.flip(0), shape))
    assert len(whole.unique()) == whole.numel()


def test_an_element_is_the_same_in_any_chunk_and_shape(monkeypatch):
    """Sizes that 4 does not divide, and blocks computed a few at a time."""
    sample = torch.tensor([3, 4])
    whole = normals(6, sample, (1001,))
    assert torch.equal(normals(6, sample, (7, 11, 13)).flatten(1), whole)
    assert torch.equal(normals(6, sample, (501,)), whole[:, :501])
    monkeypatch.setattr("snapkernels.philox._CHUNK", 14)
    assert torch.equal(normals(6, sample, (1001,)), whole)


def test_empty_shapes():
    assert normals(0, torch.tensor([], dtype=torch.int64), (3, 5)).shape == (0, 3, 5)
    assert normals(0, torch.tensor([1]), (0, 5)).shape == (1, 0, 5)
    assert normals(0, torch.tensor([1]), ()).shape == (1,)


@pytest.mark.parametrize(
    ("seed", "sample", "said"),
    [
        (-1, torch.tensor([0]), "seed: -1"),
        (2**64, torch.tensor([0]), "seed: 18446744073709551616"),
        (0, torch.tensor([0.0]), r"sample: \(1,\) float32"),
        (0, torch.tensor([0], dtype=torch.int32), r"sample: \(1,\) int32"),
        (0, torch.tensor(0), r"sample: \(\) int64"),
    ],
)
def test_bad_arguments(seed, sample, said):
    with pytest.raises(ValueError, match=said):
        normals(seed, sample, (4,))
    with pytest.raises(ValueError, match=said):
        words(seed, sample, torch.arange(4))


def test_bad_blocks():
    with pytest.raises(ValueError, match=r"blocks: \(2, 2\) int64"):
        words(0, torch.tensor([0]), torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_zeroes_by_the_words_of_a_sample_that_no_video_has(seed):
    shape, probability = (3, 7, 5), 0.3
    found = kept(seed, shape, probability, "cpu").flatten().tolist()
    for element, one in enumerate(found):
        word = by_hand((seed & ONES, seed >> 32), (element // 4, 0, ONES, ONES))[element % 4]
        assert one == (word >= int(0.3 * 2**32))


def test_dropout_keeps_its_share_and_all_without():
    share = kept(7, (400, 250), 0.1, "cpu").double().mean()
    assert abs(share - 0.9) < 4 * (0.1 * 0.9 / 1e5) ** 0.5
    assert kept(7, (40, 25), 0.0, "cpu").all()
