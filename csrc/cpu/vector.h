// A vector of floats as wide as the instruction set, in the compiler's own vector extensions.
//
// Every kernel file includes this header in a translation unit that is compiled once for each instruction set.
// CRATE_ISA is the name of its namespace. The compiler chooses the instructions. Only the loads and stores of the first
// lanes, and the products of bfloat16 in product.h, use intrinsics.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define CRATE_LANES 16
#elif defined(__AVX__)
#define CRATE_LANES 8
#else
#define CRATE_LANES 4
#endif

namespace crate::CRATE_ISA {

constexpr int kLanes = CRATE_LANES;
constexpr int kVectorBytes = 4 * kLanes;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));

// Unaligned, and allowed to alias any other type, like memcpy.
typedef float LooseFloats __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }

// The first `count` lanes, 0 < count < kLanes. Memory after them is not accessed. The other lanes are zero.
inline Floats load_first(const float* p, int count) {
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Floats)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
#else
    Floats v{};
    std::memcpy(&v, p, 4 * count);
    return v;
#endif
}
inline void store_first(float* p, Floats v, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes), (__m256)v);
#else
    std::memcpy(p, &v, 4 * count);
#endif
}

inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats at_most(Floats x, float limit) {  // NaN stays
    const Floats l = broadcast(limit);
    return l < x ? l : x;
}
// The same bits: a cast between vectors of equal size does not convert.
inline Floats as_floats(Ints v) { return (Floats)v; }
inline Ints as_ints(Floats v) { return (Ints)v; }

using Lanes = std::make_integer_sequence<int, kLanes>;

// Selects lanes of a or b by number; the lanes of b are counted from kLanes on. The numbers are compile-time constants.
template <class Number, int... l>
inline Floats shuffle(Floats a, Floats b, Number number, std::integer_sequence<int, l...>) {
    return __builtin_shuffle(a, b, Ints{number(l)...});
}

template <int kHalf>
inline Floats add_halves(Floats v) {
    return v + shuffle(v, v, [](int l) { return l ^ kHalf; }, Lanes());
}

// The sum of all lanes, in a fixed order.
inline float sum(Floats v) {
    if constexpr (kLanes >= 16) v = add_halves<8>(v);
    if constexpr (kLanes >= 8) v = add_halves<4>(v);
    return add_halves<1>(add_halves<2>(v))[0];
}

// Transposes a square of vectors.
template <int kStep>
inline void transpose_step(Floats v[kLanes]) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
        if (r & kStep) continue;
        const Floats a = v[r], b = v[r + kStep];
        v[r] = shuffle(a, b, [](int l) { return l & kStep ? kLanes + l - kStep : l; }, Lanes());
        v[r + kStep] = shuffle(a, b, [](int l) { return l & kStep ? kLanes + l : l + kStep; }, Lanes());
    }
}

inline void transpose(Floats v[kLanes]) {
    transpose_step<1>(v);
    transpose_step<2>(v);
    if constexpr (kLanes >= 8) transpose_step<4>(v);
    if constexpr (kLanes >= 16) transpose_step<8>(v);
}

constexpr float kLog2E = 1.44269504088896340736f;

// 2^x, to two units in the last place; 0 below -126, NaN for NaN. Not meant for x above 127.
inline Floats exp2(Floats x) {
    const Floats low = broadcast(-126.0f);
    const Ints underflow = x < low;
    x = select(underflow, low, x);
    const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);  // in [-1/2, 1/2]
    Floats poly = broadcast(1.5403530393381606e-4f);
    poly = poly * f + broadcast(1.3333558146428443e-3f);
    poly = poly * f + broadcast(9.618129107628477e-3f);
    poly = poly * f + broadcast(5.5504108664821580e-2f);
    poly = poly * f + broadcast(2.4022650695910072e-1f);
    poly = poly * f + broadcast(6.9314718055994531e-1f);
    poly = poly * f + broadcast(1.0f);
    const Floats power = as_floats((as_ints(shifted) + 127) << 23);
    return select(underflow, Floats{}, poly * power);
}

// 2^x for x <= 0, with a relative error of 3e-6, but never below 2^-126. For weights that are rounded to bfloat16, and
// for sums.
inline Floats exp2_of_weight(Floats x) {
    x = max(x, broadcast(-126.0f));
    const Floats magic = broadcast(12582912.0f);
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats poly = broadcast(9.582852865584015e-3f);
    poly = poly * f + broadcast(5.590642492460185e-2f);
    poly = poly * f + broadcast(2.40240986167559e-1f);
    poly = poly * f + broadcast(6.931241933586839e-1f);
    poly = poly * f + broadcast(1.0f);
    return poly * as_floats((as_ints(shifted) + 127) << 23);
}

// log2(x) of a positive normal number, to three units in the last place or 2e-7. NaN and infinity are returned
// unchanged.
inline Floats log2(Floats x) {
    const Ints offset = as_ints(x) - 0x3f3504f3;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
    const Ints exponent = offset >> 23;
    const Floats mantissa = as_floats(as_ints(x) - (exponent << 23));
    // log(m) = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.1716
    const Floats s = (mantissa - 1.0f) / (mantissa + 1.0f), square = s * s;
    Floats series = square * 0.32059889f + 0.41219858f;  // 2 log2(e) / 9, / 7, ...
    series = series * square + 0.57707802f;
    series = series * square + 0.96179669f;
    series = series * square + 2.88539008f;
    const Floats value = __builtin_convertvector(exponent, Floats) + s * series;
    return select(x < INFINITY, value, x);
}

}  // namespace crate::CRATE_ISA
