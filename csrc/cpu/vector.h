// A vector of floats as wide as the instruction set, in the compiler's own vector extensions.
//
// Every kernel file includes this header inside a translation unit that is compiled once for each instruction set, with
// CRATE_ISA as the name of its namespace. Nothing below names an instruction: the compiler chooses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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

// Unaligned, and allowed to alias any other type, as memcpy is.
typedef float LooseFloats __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t x) { return x - Ints{}; }
inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
// The same bits: a cast between vectors of one size converts nothing.
inline Floats as_floats(Ints v) { return (Floats)v; }
inline Ints as_ints(Floats v) { return (Ints)v; }

// The sum of all lanes, in a fixed order.
inline float sum(Floats v) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
        Ints other;
        for (int l = 0; l < kLanes; ++l) other[l] = l ^ half;
        v += __builtin_shuffle(v, other);
    }
    return v[0];
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

}  // namespace crate::CRATE_ISA
