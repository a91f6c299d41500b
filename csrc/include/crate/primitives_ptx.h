// The primitives as PTX, for sm_80 and up. The contract is in primitives.h.
#pragma once

#include <type_traits>

namespace crate {

using SharedAddress = uint32_t;

CRATE_DEVICE int thread_index() { return threadIdx.x; }
CRATE_DEVICE int warp_index() { return threadIdx.x / kWarpSize; }
// The other indices are volatile: the compiler reads them again where they are used, and does not hold them, or what
// follows from them, in registers through a whole kernel.
CRATE_DEVICE int lane_index() {
    int index;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(index));
    __builtin_assume(index >= 0 && index < kWarpSize);
    return index;
}
CRATE_DEVICE int warp_index_again() { return (threadIdx.x - lane_index()) / kWarpSize; }
CRATE_DEVICE int block_index() {
    int index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    __builtin_assume(index >= 0);
    return index;
}
CRATE_DEVICE int block_threads() { return blockDim.x; }

CRATE_DEVICE void sync_block() { __syncthreads(); }
CRATE_DEVICE void sync_warp() { __syncwarp(); }
CRATE_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
CRATE_DEVICE bool warp_any(bool v) { return __any_sync(~0u, v); }

CRATE_DEVICE SharedAddress shared_base() {
    extern __shared__ uint4 dynamic_shared_memory[];
    return static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared_memory));
}

template <class T>
CRATE_DEVICE T load_shared(SharedAddress address) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
    uint32_t v[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4)
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v[0]) : "r"(address) : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(address) : "memory");
    else
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
    T out;
    memcpy(&out, v, sizeof(T));
    return out;
}

template <class T>
CRATE_DEVICE void store_shared(SharedAddress address, const T& value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
    uint32_t v[sizeof(T) / 4];
    memcpy(v, &value, sizeof(T));
    if constexpr (sizeof(T) == 4)
        asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(v[0]) : "memory");
    else if constexpr (sizeof(T) == 8)
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(address), "r"(v[0]), "r"(v[1]) : "memory");
    else
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

template <class T>
CRATE_DEVICE T load_global(const T* p) { return *p; }
CRATE_DEVICE Chunk load_global(const Chunk* p) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
}
template <class T>
CRATE_DEVICE void store_global(T* p, const T& v) { *p = v; }
CRATE_DEVICE void store_global(Chunk* p, const Chunk& v) {
    *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

CRATE_DEVICE void copy_async(SharedAddress to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
CRATE_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
CRATE_DEVICE void wait_async() { asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory"); }

CRATE_DEVICE void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
CRATE_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
CRATE_DEVICE uint32_t transpose_matrix(uint32_t r) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(r));
    return out;
}

template <class T>
CRATE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, bf16>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
CRATE_DEVICE uint32_t pack(float lo, float hi) {
    uint32_t v;
    if constexpr (std::is_same_v<T, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
template <class T>
CRATE_DEVICE void unpack(uint32_t v, float& lo, float& hi) {
    if constexpr (std::is_same_v<T, bf16>) {
        lo = __uint_as_float(v << 16);
        hi = __uint_as_float(v & 0xffff0000u);
    } else {
        asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
            : "=f"(lo), "=f"(hi) : "r"(v));
    }
}

CRATE_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
CRATE_DEVICE float log2_approx(float x) { return __log2f(x); }
CRATE_DEVICE float rsqrt_approx(float x) { return rsqrtf(x); }
CRATE_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
CRATE_DEVICE float at_most_zero(float x) {
    float y;
    asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace crate
