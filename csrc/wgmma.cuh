// Hopper's asynchronous pieces, each one instruction: products of matrices in shared memory, the
// barriers that hand stages on, and copies past the registers.
//
// Every matrix here is in rows of 128 bytes, 1024-byte aligned in eights, with the 16-byte chunks
// of row r exchanged by an exclusive or with r % 8: the 128-byte swizzle, conflict-free both ways.
#pragma once

#include <cstdint>

namespace snapkernels {

constexpr int kMatrixRow = 128;  // bytes: 64 bfloat16

// Where the 16 bytes `chunk` (0 to 7) of row `row` lie in such a matrix.
__device__ inline int swizzled(int row, int chunk) {
  return row * kMatrixRow + ((chunk ^ (row % 8)) << 4);
}

// wgmma's view of a matrix from `address` on: bits 0 to 13 the address, 16 to 29 a step that one
// block of 64 never takes, 32 to 45 the next eight rows, 62 and 63 the swizzle; in 16s of bytes.
// Rows are of M or N with 16 of K as 32 bytes of each; or, transposed, of K with 64 of M in each.
__device__ inline uint64_t matrix_view(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | 1ull << 16 |
         static_cast<uint64_t>(8 * kMatrixRow >> 4) << 32 | 1ull << 62;
}

// The same without swizzle: blocks of 8 rows of 16 bytes, the second half of 16 of K 128 bytes on,
// the next eight rows 256.
__device__ inline uint64_t plain_view(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | 8ull << 16 | 16ull << 32;
}

__device__ inline uint64_t further(uint64_t view, int bytes) { return view + (bytes >> 4); }

// Accumulators of 64 x 8 kBlocks: column 8 j + 2 q + i % 2 of row r + 8 (i / 2) of a warp's 16, in
// lane 4 r + q.
template <int kBlocks>
using Accumulators = float[kBlocks][4];

// Of 32 columns four lanes q have pairs from 8 b + 2 q on, b of 0 to 3: now they have those from
// 8 q + 2 b on, 8 columns in a row. Its own inverse.
__device__ inline uint4 exchanged(const uint4& pairs) {
  const bool odd = threadIdx.x % 2, high = threadIdx.x % 4 / 2;
  uint32_t w[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int two = 0; two < 4; two += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? w[two] : w[two + 1], 1);
    (odd ? w[two] : w[two + 1]) = other;
  }
#pragma unroll
  for (int one = 0; one < 2; ++one) {
    const uint32_t other = __shfl_xor_sync(~0u, high ? w[one] : w[one + 2], 2);
    (high ? w[one] : w[one + 2]) = other;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

#define SNAP_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])

// 64 x 56, 16 of K, added to `sum` or its first. kTransposedA: rows of `a` are of K.
template <bool kTransposedA, bool kAdd>
__device__ inline void multiply(Accumulators<7>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27}, %28, %29, %30, 1, 1, %31, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0), "n"(kTransposedA ? 1 : 0));
}

// 64 x 104.
template <bool kTransposedA, bool kAdd>
__device__ inline void multiply(Accumulators<13>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n104k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51}, "
      "%52, %53, %54, 1, 1, %55, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0), "n"(kTransposedA ? 1 : 0));
}

// 64 x 128, rows of both of M and N.
template <bool kAdd>
__device__ inline void multiply(Accumulators<16>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, %66, 1, 1, 0, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12), SNAP_FOUR(13), SNAP_FOUR(14), SNAP_FOUR(15)
      : "l"(a), "l"(b), "n"(kAdd ? 1 : 0));
}

// 64 x 48 and 64 x 16, rows of both of K, added to `sum`.
__device__ inline void multiply_columns(Accumulators<6>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23}, %24, %25, 1, 1, 1, 1, 1;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5)
      : "l"(a), "l"(b));
}

__device__ inline void multiply_columns(Accumulators<2>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 1, 1;"
      : SNAP_FOUR(0), SNAP_FOUR(1)
      : "l"(a), "l"(b));
}

// Added to `sum`, with 64 x 16 of A in registers: rows r and r + 8 of a warp's 16, first
// of K 2 q and 2 q + 1, then of 2 q + 8 and 2 q + 9. They are the tensor cores' until the wait.
__device__ inline void multiply_held(Accumulators<7>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n56k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27}, {%28, %29, %30, %31}, %32, 1, 1, 1, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held(Accumulators<13>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n104k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
      "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51}, "
      "{%52, %53, %54, %55}, %56, 1, 1, 1, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held(Accumulators<6>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
      "%20, %21, %22, %23}, {%24, %25, %26, %27}, %28, 1, 1, 1, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held(Accumulators<2>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef SNAP_FOUR

// Before the first product after other code touched its accumulators.
__device__ inline void multiply_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the last kLater commits are done.
template <int kLater>
__device__ inline void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory");
}

// Keeps the compiler from moving what it does to `sum` across this.
template <int kBlocks>
__device__ inline void settle(Accumulators<kBlocks>& sum) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sum[j][i])::"memory");
  }
}

// What this thread wrote to shared memory becomes visible to wgmma and to bulk copies, which are
// another proxy.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four (two) 8 x 8 matrices, transposed: of matrix i, whose row l % 8 is at the address of lane
// l = 8 i + l % 8, lane 4 r + q gets rows 2 q and 2 q + 1 of column r.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_transposed(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(address)
               : "memory");
}

// Four matrices as they lie: lane 4 r + q gets columns 2 q and 2 q + 1 of row r.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Its inverse.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// 16 bytes, and two bfloat16, of shared memory.
__device__ inline uint4 load_vector(uint32_t address) {
  uint4 loaded;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "r"(address)
               : "memory");
  return loaded;
}

__device__ inline float load_float(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline void store_float(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline uint32_t load_pair(uint32_t address) {
  uint32_t pair;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(address) : "memory");
  return pair;
}

// 16 bytes that this block will not read again: they leave the cache to others. Volatile: under way
// from here on, not from their first use.
__device__ inline float4 load_once(const float* from) {
  float4 loaded;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(loaded.x), "=f"(loaded.y), "=f"(loaded.z), "=f"(loaded.w)
               : "l"(from));
  return loaded;
}

// How L2 is to hold what passes once: as the first to make room.
__device__ inline uint64_t first_to_leave() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// As it holds anything else: what other blocks will read.
__device__ inline uint64_t stays() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from device memory; or zeros, and `from` is not read.
__device__ inline void copy_to_shared(uint32_t to, const void* from, bool some, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(some ? 16 : 0), "l"(policy)
               : "memory");
}

// The same without a policy, and four bytes; for zeros `from` is not read either.
__device__ inline void copy_to_shared(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void copy_word_to_shared(uint32_t to, const void* from, bool some) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(some ? 4 : 0)
               : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but this thread's last kLater commits have arrived.
template <int kLater>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

__device__ inline void copies_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Named barriers of `threads` of the block; 0 is __syncthreads().
__device__ inline void barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A barrier of `arrivals`, at 8 bytes of shared memory. Its phase flips when all have arrived.
__device__ inline void phase_begin(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the barriers of a block began, by the thread that did: bulk copies know them.
__device__ inline void phases_begun() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void phase_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and the phase then lasts until so many bytes more have come.
__device__ inline void phase_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Bytes in 16s that lie in a row, counted by a barrier. Visible to wgmma without publish().
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Until the phase of this parity is over; that before the first counts as over, and is odd.
__device__ inline void phase_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Registers of a thread of this warpgroup, in 8s, given up to or taken from the block's pool.
template <int kRegisters>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A launch overlaps the end of the kernel before. Until this has returned nothing that it wrote is
// read, and nothing that it reads written; what was done before its own wait is done.
__device__ inline void kernel_before_done() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Once a thread of every block has come here, blocks of the next kernel take what room there is.
__device__ inline void next_kernel_may_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Both, for a kernel that has nothing to do before.
__device__ inline void after_kernel_before() {
  next_kernel_may_start();
  kernel_before_done();
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

}  // namespace snapkernels
