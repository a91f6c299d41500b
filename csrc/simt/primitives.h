// The primitives of crate/primitives.h on the emulated machine. Fragment layouts follow the PTX ISA, section
// "Warp level matrix instructions"; tests/cuda checks them against its element formulas.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "crate/numeric.h"
#include "simt/machine.h"

namespace crate {

using SharedAddress = uint32_t;

inline int thread_index() { return simt::current->index; }
inline int lane_index() { return simt::current->lane; }
inline int warp_index() { return simt::current->index / kWarpSize; }
inline int warp_index_again() { return warp_index(); }
inline int block_index() { return simt::current_block().block_index; }
inline int block_threads() { return simt::current_block().threads; }

inline void sync_block() { simt::current_block().sync_block(); }
inline void sync_warp() { simt::current_block().sync_warp(); }

inline float shuffle_xor(float v, int mask) {
    struct Argument { float in, out; int mask; } self{v, 0.0f, mask};
    simt::current_block().collective("shuffle", self, [](Argument* const(&lane)[32]) {
        for (int l = 0; l < 32; ++l) lane[l]->out = lane[(l ^ lane[l]->mask) & 31]->in;
    });
    return self.out;
}

inline bool warp_any(bool v) {
    struct Argument { bool in, out; } self{v, false};
    simt::current_block().collective("vote", self, [](Argument* const(&lane)[32]) {
        bool any = false;
        for (auto* l : lane) any |= l->in;
        for (auto* l : lane) l->out = any;
    });
    return self.out;
}

inline SharedAddress shared_base() { return 0; }

template <class T>
T load_shared(SharedAddress address, int site = __builtin_LINE()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
    T out;
    simt::current_block().read_shared(address, &out, sizeof(T), site);
    return out;
}
template <class T>
void store_shared(SharedAddress address, const T& value, int site = __builtin_LINE()) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
    simt::current_block().write_shared(address, &value, sizeof(T), site);
}

template <class T>
T load_global(const T* p) {
    simt::current_block().counters.global_bytes_read += sizeof(T);
    return *p;
}
template <class T>
void store_global(T* p, const T& v) {
    simt::current_block().counters.global_bytes_written += sizeof(T);
    *p = v;
}

inline void copy_async(SharedAddress to, const void* from) { simt::current_block().copy_async(to, from); }
inline void commit_async() { simt::current_block().commit_async(); }
template <int kPending>
void wait_async() { simt::current_block().wait_async(kPending); }

// Four 8x8 matrices of 16-bit elements: lanes 8m to 8m+7 give the addresses of the rows of matrix m, and lane l
// receives of each matrix the elements 2(l%4) and 2(l%4)+1 of row l/4 (transposed: of column l/4).
template <bool kTransposed>
void load_matrix_x4_impl(uint32_t (&r)[4], SharedAddress row) {
    struct Argument { uint32_t row; uint32_t* r; } self{row, r};
    simt::current_block().collective("ldmatrix", self, [](Argument* const(&lane)[32]) {
        uint32_t address[32];
        uint16_t element[32][8];
        for (int l = 0; l < 32; ++l) address[l] = lane[l]->row;
        simt::current_block().read_matrix_rows(address, element);
        for (int l = 0; l < 32; ++l)
            for (int m = 0; m < 4; ++m) {
                const int i = l / 4, j = 2 * (l % 4);
                const uint32_t lo = kTransposed ? element[8 * m + j][i] : element[8 * m + i][j];
                const uint32_t hi = kTransposed ? element[8 * m + j + 1][i] : element[8 * m + i][j + 1];
                lane[l]->r[m] = lo | hi << 16;
            }
    });
}
inline void load_matrix_x4(uint32_t (&r)[4], SharedAddress row) { load_matrix_x4_impl<false>(r, row); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row) { load_matrix_x4_impl<true>(r, row); }

inline uint32_t transpose_matrix(uint32_t r) {
    struct Argument { uint32_t in, out; } self{r, 0};
    simt::current_block().collective("movmatrix", self, [](Argument* const(&lane)[32]) {
        const auto element = [&](int i, int j) { return lane[4 * i + j / 2]->in >> 16 * (j % 2) & 0xffffu; };
        for (int l = 0; l < 32; ++l) lane[l]->out = element(2 * (l % 4), l / 4) | element(2 * (l % 4) + 1, l / 4) << 16;
    });
    return self.out;
}

inline float bits_to_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint32_t float_to_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

inline float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float to_float(fp16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
    if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // After the shift the exponent is too small by 112. The product corrects it and normalizes subnormals.
    const float magnitude = bits_to_float(rest << 13) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

template <class T>
T round_to(float f) {
    const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if constexpr (std::is_same_v<T, bf16>) {
        if (magnitude > 0x7f800000u) return {0x7fff};
        return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
    } else {
        if (magnitude > 0x7f800000u) return {0x7fff};
        if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
        if (magnitude < 0x38800000u)                                      // subnormal: the sum rounds to units of 2^-24
            return {uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
        const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
        return {uint16_t(sign | ((rounded >> 13) - (112u << 10)))};
    }
}

template <class T>
uint32_t pack(float lo, float hi) { return round_to<T>(lo).bits | uint32_t(round_to<T>(hi).bits) << 16; }
template <class T>
void unpack(uint32_t v, float& lo, float& hi) {
    lo = to_float(T{uint16_t(v)});
    hi = to_float(T{uint16_t(v >> 16)});
}

// With g = lane/4 and t = lane%4: a[r] contains row g + 8(r%2), columns 2t + 8(r/2) and the next; b[r] contains column
// g, rows 2t + 8r and the next; c[e] contains row g + 8(e/2), column 2t + e%2.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Argument { float* c; const uint32_t* a; uint32_t b[2]; } self{c, a, {b0, b1}};
    simt::current_block().collective("mma", self, [](Argument* const(&lane)[32]) {
        float left[16][16], right[16][8];
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4;
            for (int r = 0; r < 4; ++r) {
                float* at = &left[g + 8 * (r % 2)][2 * t + 8 * (r / 2)];
                unpack<T>(lane[l]->a[r], at[0], at[1]);
            }
            for (int r = 0; r < 2; ++r) unpack<T>(lane[l]->b[r], right[2 * t + 8 * r][g], right[2 * t + 8 * r + 1][g]);
        }
        for (int i = 0; i < 16; ++i) {
            float sum[8] = {};
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 8; ++j) sum[j] += left[i][k] * right[k][j];
            for (int j = 0; j < 8; ++j) lane[4 * (i % 8) + j / 2]->c[2 * (i / 8) + j % 2] += sum[j];
        }
        ++simt::current_block().counters.mma;
    });
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) {
    ++simt::current_block().counters.exp2;
    return flush(std::exp2(flush(x)));
}
inline float log2_approx(float x) { return std::log2(x); }
inline float rsqrt_approx(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal_approx(float x) { return flush(1.0f / flush(x)); }
inline float at_most_zero(float x) { return x > 0.0f ? 0.0f : x; }

}  // namespace crate
