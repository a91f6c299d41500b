// Matrix products with an optional LayerNorm or ReLU gate before them, and residual, bias, threshold and ReLU after
// them.
//
// C = A B is computed in tiles of kRows x kColumns that stay in registers. A and B are copied into the order in which
// the tile reads them: A row by row, B in panels of kColumns columns. The copy applies the norm or the gate and
// converts elements, so that the tile reads only one format. An operand of a low-precision product consists of pairs of
// bfloat16 that are neighbors along the depth. A pair takes the place of one float ("unit" below).
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "memory.h"

namespace crate::CRATE_ISA {

#if CRATE_LANES == 16
constexpr int kRows = 12, kVectors = 2;  // 24 accumulators, 2 vectors of B and 1 element of A in 32 registers
#elif CRATE_LANES == 8
constexpr int kRows = 6, kVectors = 2;  // 12 + 2 + 1 of 16 registers
#else
constexpr int kRows = 6, kVectors = 4;  // 24 + 4 + 1 of 32 registers
#endif
constexpr int kColumns = kVectors * kLanes;

#if defined(__AMX_BF16__)
constexpr bool kHasPairs = true, kHasTiles = true;
constexpr int kPairRows = 32, kPairDepth = 16;  // two tile registers of 16 rows; 16 pairs per row of a tile register
#elif defined(__AVX512BF16__)
constexpr bool kHasPairs = true, kHasTiles = false;
constexpr int kPairRows = kRows, kPairDepth = 1;
#else
constexpr bool kHasPairs = false, kHasTiles = false;
constexpr int kPairRows = kRows, kPairDepth = 1;
#endif

template <bool kPairs>
constexpr int kChain = kPairs ? 96 : 192;  // units per accumulator: small rounding errors, and a piece of B in the L1 cache
constexpr int kBlockRows = 96;    // rows of A that one thread packs at a time; they stay in its L2 cache
constexpr int kDepthBlock = 1024; // depth of a product over tokens that is packed at a time

template <bool kPairs>
struct Engine {
    static constexpr int rows = kPairs ? kPairRows : kRows;
    static int64_t units(int64_t depth) { return kPairs ? round_up((depth + 1) / 2, kPairDepth) : depth; }
};

// Calls f(true) if operands are pairs of bfloat16, else f(false).
template <class F>
inline void with_engine(bool low_precision, F f) {
    if constexpr (kHasPairs)
        if (low_precision) return f(std::true_type());
    f(std::false_type());
}

// -- the tile ------------------------------------------------------------------------------------------------------

template <bool kPairs>
inline Floats multiply_add(float a, Floats b, Floats sum) {
    if constexpr (!kPairs) {
        return broadcast(a) * b + sum;
    } else {
#if defined(__AVX512BF16__)
        int32_t pair;
        std::memcpy(&pair, &a, 4);
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)(__m512)b);
#else
        return sum;
#endif
    }
}

// out (kRows x kColumns) = or += A B. Element (i, k) of A is a[i * stride + k], or a[k * stride + i] if transposed.
template <bool kPairs, bool kTransposed>
__attribute__((noinline)) void multiply_chain(const float* a, int64_t stride, const float* b, int64_t units, float* out,
                                              int64_t out_stride, bool add) {
    constexpr int kGroup = 3;  // rows that share one pointer, so that the addresses fit the registers
    static_assert(kRows % kGroup == 0);
    Floats sums[kRows][kVectors];
    const float* rows[kRows / kGroup];
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) sums[i][v] = Floats{};
    for (int i = 0; i < kRows / kGroup; ++i) rows[i] = a + i * kGroup * stride;
    for (int64_t k = 0; k < units; ++k) {
        Floats columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const float element = kTransposed ? a[i] : rows[i / kGroup][(i % kGroup) * stride];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add<kPairs>(element, columns[v], sums[i][v]);
        }
        b += kColumns;
        if constexpr (kTransposed) {
            a += stride;
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < kRows / kGroup; ++i) ++rows[i];
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) {
            float* p = out + i * out_stride + v * kLanes;
            store(p, add ? load(p) + sums[i][v] : sums[i][v]);
        }
}

#if defined(__AMX_BF16__)
// The same in tile registers, for 32 x 32 elements: two by two tiles of 16 x 16 elements.
template <>
__attribute__((noinline)) inline void multiply_chain<true, false>(const float* a, int64_t stride, const float* b,
                                                                  int64_t units, float* out, int64_t out_stride,
                                                                  bool add) {
    float* below = out + 16 * out_stride;
    if (add) {
        _tile_loadd(0, out, out_stride * 4);
        _tile_loadd(1, out + 16, out_stride * 4);
        _tile_loadd(2, below, out_stride * 4);
        _tile_loadd(3, below + 16, out_stride * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < units; k += kPairDepth) {
        _tile_loadd(4, a + k, stride * 4);
        _tile_loadd(5, a + 16 * stride + k, stride * 4);
        _tile_loadd(6, b + k * kColumns, kColumns * 4);
        _tile_loadd(7, b + k * kColumns + 16, kColumns * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_stride * 4);
    _tile_stored(1, out + 16, out_stride * 4);
    _tile_stored(2, below, out_stride * 4);
    _tile_stored(3, below + 16, out_stride * 4);
}
#endif

// Tile registers are configured while an instance lives, and released afterwards, so that the thread's context stays
// small.
struct TileRegisters {
#if defined(__AMX_BF16__)
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } configuration;
        _tile_loadconfig(&configuration);
    }
    ~TileRegisters() { _tile_release(); }
#else
    TileRegisters() {}
#endif
};

// out = A B over the whole depth; with `add`, out += A B.
template <bool kPairs, bool kTransposed>
inline void multiply_tile(const float* a, int64_t stride, const float* b, int64_t units, float* out,
                          int64_t out_stride = kColumns, bool add = false) {
    int64_t k = 0;
    do {
        const int64_t chain = units - k < kChain<kPairs> ? units - k : kChain<kPairs>;
        multiply_chain<kPairs, kTransposed>(a + (kTransposed ? k * stride : k), stride, b + k * kColumns, chain, out,
                                            out_stride, add || k > 0);
        k += chain;
    } while (k < units);
}

// -- operands ------------------------------------------------------------------------------------------------------

// A row-major matrix, read through a LayerNorm of its rows, or with zeros at positions where another matrix is not
// positive.
struct Source {
    const void* data = nullptr;
    int64_t type = kFloat32, stride = 0;
    const float *mean = nullptr, *rstd = nullptr;   // of each row; no norm if null
    const float *gamma = nullptr, *beta = nullptr;  // of each column
    const void* gate = nullptr;
    int64_t gate_type = kFloat32, gate_stride = 0;

    Source() = default;
    Source(const Array& a) : data(a.data), type(a.type), stride(a.stride) {}
    Source(const MutableArray& a) : data(a.data), type(a.type), stride(a.stride) {}
    Source(const float* p, int64_t row_stride) : data(p), stride(row_stride) {}

    Source normalized(const float* row_mean, const float* row_rstd, const float* weight, const float* bias) const {
        Source s = *this;
        s.mean = row_mean, s.rstd = row_rstd, s.gamma = weight, s.beta = bias;
        return s;
    }
    Source gated(const Array& by) const {
        Source s = *this;
        s.gate = by.data, s.gate_type = by.type, s.gate_stride = by.stride;
        return s;
    }
};

inline bool plain_pairs(const Source& s) { return s.type == kBfloat16 && s.mean == nullptr && s.gate == nullptr; }
inline bool plain_floats(const Source& s) { return s.type == kFloat32 && s.mean == nullptr && s.gate == nullptr; }

inline const uint16_t* half_row(const Source& s, int64_t row, int64_t column) {
    return static_cast<const uint16_t*>(s.data) + row * s.stride + column;
}

inline const float* float_row(const Source& s, int64_t row, int64_t column) {
    return static_cast<const float*>(s.data) + row * s.stride + column;
}

// `count` elements of a row as floats. The last vector is filled with zeros.
inline void fetch(const Source& s, int64_t row, int64_t column, int64_t count, float* out) {
    read(s.data, s.type, row * s.stride + column, count, out);
    if (s.mean != nullptr) {
        const Floats mean = broadcast(s.mean[row]), rstd = broadcast(s.rstd[row]);
        for (int64_t i = 0; i < count; i += kLanes) {
            const Floats x = (load(out + i) - mean) * rstd;
            store(out + i, x * load(s.gamma + column + i) + load(s.beta + column + i));
        }
        if (count % kLanes)
            for (int64_t i = count; i % kLanes; ++i) out[i] = 0;
    }
    if (s.gate != nullptr) {
        with_type(s.gate_type, [&](auto kType) {
            int64_t i = 0;
            for (; i + kLanes <= count; i += kLanes) {
                const Floats gate = load_as<kType>(s.gate, row * s.gate_stride + column + i);
                store(out + i, gate <= 0.0f ? Floats{} : load(out + i));
            }
            if (i < count) {
                alignas(64) float gate[kLanes];
                read(s.gate, s.gate_type, row * s.gate_stride + column + i, count - i, gate);
                store(out + i, load(gate) <= 0.0f ? Floats{} : load(out + i));
            }
        });
    }
}

// Prefetches rows that a copy will read soon. Neighbors in a column are on different pages, which hardware does not
// prefetch.
inline void prefetch(const Source& s, int64_t row, int64_t column, int64_t count) {
    const char* p = static_cast<const char*>(s.data) + (row * s.stride + column) * bytes_of(s.type);
    for (int64_t byte = 0; byte < count * bytes_of(s.type); byte += 64) __builtin_prefetch(p + byte);
}
constexpr int kAhead = 12;

// Two rows of floats as pairs of bfloat16, with the first row in the low half.
inline Floats pair_up(Floats low, Floats high) {
#if defined(__AVX512BF16__)
    const auto bits = [](Floats x) { return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); };
#else
    const auto bits = [](Floats x) { return to_bfloat16(x); };
#endif
    return as_floats(bits(low) | (bits(high) << 16));
}

// Two vectors of neighbors as one vector of pairs.
inline void store_pairs(float* out, Floats first, Floats second) {
#if defined(__AVX512BF16__)
    store(out, (Floats)(__m512)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    store_as<kBfloat16>(out, 0, first);
    store_as<kBfloat16>(out, kLanes, second);
#endif
}

// The sum of the squares of a row of pairs.
inline float square_of_pairs(const float* row, int64_t units) {
    Floats total{};
    for (int64_t k = 0; k < units; k += kLanes) {
#if defined(__AVX512BF16__)
        const __m512bh pairs = (__m512bh)(__m512)load(row + k);
        total = (Floats)_mm512_dpbf16_ps((__m512)total, pairs, pairs);
#else
        const Ints pairs = as_ints(load(row + k));
        const Floats low = from_bfloat16(pairs), high = as_floats(pairs & broadcast(int32_t(0xffff0000)));
        total += low * low + high * high;
#endif
    }
    return sum(total);
}

// `count` elements of a row as `units` pairs of neighbors, followed by zeros. Writes whole vectors.
inline void fetch_pairs(const Source& s, int64_t row, int64_t column, int64_t count, int64_t units, float* out) {
    units = round_up(units, kLanes);
    if (plain_pairs(s)) {
        char* bytes = reinterpret_cast<char*>(out);
        std::memcpy(bytes, half_row(s, row, column), size_t(count) * 2);
        std::memset(bytes + count * 2, 0, size_t(units * 4 - count * 2));
        return;
    }
    Frame frame;
    float* floats = frame.take(2 * units);
    fetch(s, row, column, count, floats);
    for (int64_t k = round_up(count, kLanes); k < 2 * units; k += kLanes) store(floats + k, Floats{});
    for (int64_t k = 0; k < units; k += kLanes) store_pairs(out + k, load(floats + 2 * k), load(floats + 2 * k + kLanes));
}

template <bool kPairs>
inline int64_t packed_floats(int64_t depth, int64_t columns) {
    return round_up(columns, kColumns) * Engine<kPairs>::units(depth);
}

// Units [begin, end) of B, in all panels. Row k of the source is row k - first of B.
template <bool kPairs>
inline void pack_units_of_rows(const Source& s, int64_t first, int64_t depth, int64_t columns, int64_t begin, int64_t end,
                               float* out) {
    const int64_t panel = Engine<kPairs>::units(depth) * kColumns, padded = round_up(columns, kColumns);
    Frame frame;
    float* low = frame.take(padded);
    float* high = frame.take(padded);
    for (int64_t k = begin; k < end; ++k) {
        const int64_t row = kPairs ? 2 * k : k;
        if (kPairs && plain_pairs(s) && row + 1 < depth && columns % kLanes == 0) {
            const uint16_t *first_row = half_row(s, first + row, 0), *second_row = half_row(s, first + row + 1, 0);
            for (int64_t c = 0; c < padded; c += kLanes) {
                const bool there = c < columns;
                const Ints pairs = there ? widen(first_row + c) | (widen(second_row + c) << 16) : Ints{};
                store(out + c / kColumns * panel + k * kColumns + c % kColumns, as_floats(pairs));
            }
            continue;
        }
        for (int64_t c = round_up(columns, kLanes); c < padded; c += kLanes) store(low + c, Floats{}), store(high + c, Floats{});
        const auto fetch_row = [&](int64_t r, float* to) {
            if (r < depth) fetch(s, first + r, 0, columns, to);
            else std::memset(to, 0, size_t(padded) * 4);
        };
        fetch_row(row, low);
        if (kPairs) fetch_row(row + 1, high);
        for (int64_t c = 0; c < padded; c += kColumns)
            for (int v = 0; v < kColumns; v += kLanes) {
                const Floats x = load(low + c + v);
                store(out + c / kColumns * panel + k * kColumns + v, kPairs ? pair_up(x, load(high + c + v)) : x);
            }
    }
}

// One panel of B, units x kColumns, if B is stored transposed. Row j of the source is column j of B, beginning at depth
// `first`.
template <bool kPairs>
inline void pack_panel_of_columns(const Source& s, int64_t first, int64_t depth, int64_t column, int64_t count,
                                  float* out) {
    constexpr int kElements = kPairs ? 2 * kLanes : kLanes;  // elements of the depth in one vector of units
    const int64_t units = Engine<kPairs>::units(depth);
    for (int64_t k = 0; k < units; k += kLanes) {
        const int64_t element = k * (kPairs ? 2 : 1);
        const int64_t present = depth - element < kElements ? depth - element : kElements;
        for (int group = 0; group < kColumns; group += kLanes) {
            if (group >= count) {
                for (int64_t i = 0; i < kLanes && k + i < units; ++i) store(out + (k + i) * kColumns + group, Floats{});
                continue;
            }
            Floats v[kLanes];
            alignas(64) float row[kLanes];
            for (int j = 0; j < kLanes; ++j) {
                v[j] = Floats{};
                if (group + j >= count || present <= 0) continue;
                if (!kPairs && plain_floats(s)) {
                    const float* p = float_row(s, column + group + j, first + element);
                    v[j] = present == kLanes ? load(p) : load_first(p, int(present));
                    continue;
                }
                if (kPairs && plain_pairs(s) && present == kElements) {
                    std::memcpy(&v[j], half_row(s, column + group + j, first + element), kVectorBytes);
                    continue;
                }
                if constexpr (kPairs) fetch_pairs(s, column + group + j, first + element, present, kLanes, row);
                else fetch(s, column + group + j, first + element, present, row);
                v[j] = load(row);
            }
            transpose(v);
            for (int64_t i = 0; i < kLanes && k + i < units; ++i) store(out + (k + i) * kColumns + group, v[i]);
        }
    }
}

// Packs B (depth x columns) on all threads. `transposed`: the source is (columns, depth).
template <bool kPairs>
inline void pack_matrix(const Source& s, bool transposed, int64_t first, int64_t depth, int64_t columns, float* out) {
    const int64_t units = Engine<kPairs>::units(depth);
    if (!transposed) {
        parallel(units, [&](int64_t begin, int64_t end) {
            pack_units_of_rows<kPairs>(s, first, depth, columns, begin, end, out);
        });
        return;
    }
    parallel((columns + kColumns - 1) / kColumns, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t column = p * kColumns, count = columns - column < kColumns ? columns - column : kColumns;
            pack_panel_of_columns<kPairs>(s, first, depth, column, count, out + p * units * kColumns);
        }
    });
}

// Rows of A, packed by one thread: element (i, k) is data[i * stride + k], or data[k * stride + i] if transposed.
struct PackedRows {
    float* data;
    int64_t stride;
};

// The stride is not a multiple of a large power of two, so that rows do not map to the same cache sets.
inline int64_t padded_stride(int64_t units) { return round_up(units, 16) + 16; }

template <bool kPairs>
inline int64_t packed_rows_floats(int64_t rows, int64_t depth) {
    return round_up(rows, Engine<kPairs>::rows) * padded_stride(Engine<kPairs>::units(depth));
}

// Rows [first, first + rows) of A, if the source is A itself.
template <bool kPairs>
inline PackedRows pack_rows(const Source& s, int64_t first, int64_t rows, int64_t column, int64_t depth, float* out) {
    const int64_t units = Engine<kPairs>::units(depth), stride = padded_stride(units);
    for (int64_t i = 0; i < rows; ++i) {
        float* row = out + i * stride;
        if constexpr (kPairs) fetch_pairs(s, first + i, column, depth, units, row);
        else fetch(s, first + i, column, depth, row);
    }
    for (int64_t i = rows; i < round_up(rows, Engine<kPairs>::rows); ++i)
        std::memset(out + i * stride, 0, size_t(stride) * 4);
    return {out, stride};
}

// Rows [first, first + rows) of A, if the source is A transposed: row k of the source is column `start + k` of A.
// Floats stay transposed. Pairs are transposed back, because a pair must consist of neighbors along the depth.
template <bool kPairs>
inline PackedRows pack_rows_transposed(const Source& s, int64_t first, int64_t rows, int64_t start, int64_t depth,
                                       float* out) {
    if constexpr (!kPairs) {
        const int64_t stride = padded_stride(round_up(rows, kRows));
        for (int64_t k = 0; k < depth; ++k) {
            float* row = out + k * stride;
            prefetch(s, start + (k + kAhead < depth ? k + kAhead : k), first, rows);
            fetch(s, start + k, first, rows, row);
            for (int64_t i = round_up(rows, kLanes); i < round_up(rows, kRows); ++i) row[i] = 0;
        }
        return {out, stride};
    } else {
        const int64_t units = Engine<kPairs>::units(depth), stride = padded_stride(units);
        const int64_t width = round_up(rows, kLanes);
        Frame frame;
        float* low = frame.take(width);
        float* high = frame.take(width);
        float* pairs = frame.take(width * kLanes);
        for (int64_t k = 0; k < units; k += kLanes) {
            for (int t = 0; t < kLanes; ++t) {
                const int64_t element = 2 * (k + t);
                for (int64_t i = 0; i < width; i += kLanes) store(low + i, Floats{}), store(high + i, Floats{});
                for (int64_t ahead = element + kAhead; ahead < element + kAhead + 2 && ahead < depth; ++ahead)
                    prefetch(s, start + ahead, first, rows);
                if (element < depth) fetch(s, start + element, first, rows, low);
                if (element + 1 < depth) fetch(s, start + element + 1, first, rows, high);
                for (int64_t i = 0; i < width; i += kLanes)
                    store(pairs + t * width + i, pair_up(load(low + i), load(high + i)));
            }
            for (int64_t i = 0; i < width; i += kLanes) {
                Floats v[kLanes];
                for (int t = 0; t < kLanes; ++t) v[t] = load(pairs + t * width + i);
                transpose(v);
                for (int64_t r = 0; r < kLanes && i + r < round_up(rows, Engine<kPairs>::rows); ++r)
                    store(out + (i + r) * stride + k, v[r]);
            }
        }
        for (int64_t i = width; i < round_up(rows, Engine<kPairs>::rows); ++i)
            std::memset(out + i * stride, 0, size_t(stride) * 4);
        return {out, stride};
    }
}

// -- products ------------------------------------------------------------------------------------------------------

// Calls f(first row, rows) for blocks of rows on all threads. Each block begins at a multiple of the tile's rows.
template <bool kPairs, class F>
inline void for_blocks_of_rows(int64_t rows, F f) {
    constexpr int kTileRows = Engine<kPairs>::rows;
    parallel((rows + kTileRows - 1) / kTileRows, [&](int64_t begin, int64_t end) {
        const int64_t stop = end * kTileRows < rows ? end * kTileRows : rows;
        for (int64_t i = begin * kTileRows; i < stop; i += kBlockRows)
            f(i, stop - i < kBlockRows ? stop - i : int64_t(kBlockRows));
    });
}

// The last operations on a tile: out = relu(alpha * product + residual + bias - shift), with the parts that are given.
struct Finish {
    MutableArray out;
    float alpha = 1.0f, shift = 0.0f;
    const float* bias = nullptr;
    Source residual;
    bool relu = false;

    void operator()(int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) const {
        if (columns == kColumns && residual.gate == nullptr)
            with_type(out.type, [&](auto kOut) {
                with_type(residual.type, [&](auto kResidual) { whole_tile<kOut, kResidual>(row, rows, column, tile); });
            });
        else
            any_tile(row, rows, column, columns, tile);
    }

    // Prefetches the cache lines of a tile of `out`, shortly before they are written.
    void ahead(int64_t row, int64_t rows, int64_t column) const {
        const int64_t element = bytes_of(out.type);
        for (int64_t i = row; i < row + rows; ++i) {
            const char* p = static_cast<const char*>(out.data) + (i * out.stride + column) * element;
            for (int64_t byte = 0; byte < kColumns * element; byte += 64) __builtin_prefetch(p + byte, 1);
        }
    }

    Floats constant(int64_t column) const { return (bias == nullptr ? Floats{} : load(bias + column)) - shift; }
    Floats value(Floats product, Floats other, Floats added) const {
        const Floats x = product * alpha + other + added, least = broadcast(relu ? 0.0f : -INFINITY);
        return x <= least ? least : x;  // NaN stays
    }

    template <int64_t kOut, int64_t kResidual>
    void whole_tile(int64_t row, int64_t rows, int64_t column, const float* tile) const {
        const bool normalized = residual.mean != nullptr;
        Floats added[kVectors], gamma[kVectors], beta[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = column + v * kLanes;
            added[v] = constant(at);
            gamma[v] = normalized ? load(residual.gamma + at) : Floats{};
            beta[v] = normalized ? load(residual.beta + at) : Floats{};
        }
        for (int64_t i = row; i < row + rows; ++i, tile += kColumns) {
            const float mean = normalized ? residual.mean[i] : 0.0f, rstd = normalized ? residual.rstd[i] : 0.0f;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = column + v * kLanes;
                Floats other{};
                if (residual.data != nullptr) other = load_as<kResidual>(residual.data, i * residual.stride + at);
                if (normalized) other = (other - mean) * rstd * gamma[v] + beta[v];
                store_as<kOut>(out.data, i * out.stride + at, value(load(tile + v * kLanes), other, added[v]));
            }
        }
    }

    void any_tile(int64_t row, int64_t rows, int64_t column, int64_t columns, float* tile) const {
        alignas(64) float other[kColumns] = {};
        for (int64_t i = row; i < row + rows; ++i, tile += kColumns) {
            if (residual.data != nullptr) fetch(residual, i, column, columns, other);
            for (int v = 0; v < kColumns; v += kLanes) store(tile + v, value(load(tile + v), load(other + v), constant(column + v)));
            write(out.data, out.type, i * out.stride + column, columns, tile);
        }
    }
};

// tiles (rows of kColumns floats) = A times one panel of B. A piece of the panel that fits the first-level cache is
// used for all rows before the next piece is read. ahead(i) is called shortly before tile i is complete.
template <bool kPairs, bool kTransposed, class Ahead>
inline void multiply_panel(PackedRows a, const float* panel, int64_t units, int64_t rows, float* tiles, Ahead ahead) {
    int64_t k = 0;
    do {
        const int64_t chain = units - k < kChain<kPairs> ? units - k : kChain<kPairs>;
        for (int64_t i = 0; i < rows; i += Engine<kPairs>::rows) {
            if (k + chain == units) ahead(i);
            multiply_chain<kPairs, kTransposed>(a.data + (kTransposed ? k * a.stride + i : i * a.stride + k), a.stride,
                                                panel + k * kColumns, chain, tiles + i * kColumns, kColumns, k > 0);
        }
        k += chain;
    } while (k < units);
}

// Rows [first, first + rows) of out = Finish(A B), with these rows of A packed.
template <bool kPairs, bool kTransposed>
inline void multiply_block(PackedRows a, const float* b, int64_t units, int64_t first, int64_t rows, int64_t columns,
                           const Finish& finish) {
    constexpr int kTileRows = Engine<kPairs>::rows;
    alignas(64) float tiles[(kBlockRows + kTileRows - 1) / kTileRows * kTileRows * kColumns];
    [[maybe_unused]] typename std::conditional<kPairs, TileRegisters, int>::type registers{};
    const auto rows_of_tile = [&](int64_t i) { return rows - i < kTileRows ? rows - i : int64_t(kTileRows); };
    for (int64_t j = 0; j < columns; j += kColumns) {
        multiply_panel<kPairs, kTransposed>(a, b + j * units, units, rows, tiles,
                                            [&](int64_t i) { finish.ahead(first + i, rows_of_tile(i), j); });
        for (int64_t i = 0; i < rows; i += kTileRows)
            finish(first + i, rows_of_tile(i), j, columns - j < kColumns ? columns - j : kColumns, tiles + i * kColumns);
    }
}

// out (kColumns x kColumns) = the transpose of in; both have rows of kColumns floats.
inline void turn_tile(const float* in, float* out) {
    for (int r = 0; r < kColumns; r += kLanes)
        for (int c = 0; c < kColumns; c += kLanes) {
            Floats v[kLanes];
            for (int l = 0; l < kLanes; ++l) v[l] = load(in + (c + l) * kColumns + r);
            transpose(v);
            for (int l = 0; l < kLanes; ++l) store(out + (r + l) * kColumns + c, v[l]);
        }
}

// out (rows, columns) = Finish(X Mᵀ), or Finish(X M) if `transposed`, for few rows. The product is computed transposed,
// with M as the left operand, which is read in place. Only X is copied: a copy of M would cost more than the product.
inline void multiply_few_rows(const Source& x, const Source& m, bool transposed, int64_t rows, int64_t depth,
                              int64_t columns, const Finish& finish) {
    static_assert(kBlockRows % kColumns == 0 && kColumns % kLanes == 0);
    Frame outer;
    float* panels = outer.take(packed_floats<false>(depth, rows));
    pack_matrix<false>(x, true, 0, depth, rows, panels);
    parallel((columns + kBlockRows - 1) / kBlockRows, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * kBlockRows; first < end * kBlockRows && first < columns; first += kBlockRows) {
            const int64_t count = columns - first < kBlockRows ? columns - first : kBlockRows;
            Frame frame;
            PackedRows a{const_cast<float*>(transposed ? float_row(m, 0, first) : float_row(m, first, 0)), m.stride};
            // A tile reads kRows rows. Rows at multiples of 4 KiB map to one cache set, so such rows are copied.
            if (count % kRows || m.stride * 4 % 4096 == 0) {
                if (transposed)
                    a = pack_rows_transposed<false>(m, first, count, 0, depth,
                                                    frame.take(depth * padded_stride(round_up(count, kRows))));
                else
                    a = pack_rows<false>(m, first, count, 0, depth, frame.take(packed_rows_floats<false>(count, depth)));
            }
            alignas(64) float tiles[kBlockRows * kColumns], turned[kColumns * kColumns];
            for (int64_t i = 0; i < rows; i += kColumns) {
                const int64_t rows_here = rows - i < kColumns ? rows - i : kColumns;
                const auto nothing = [](int64_t) {};
                if (transposed) multiply_panel<false, true>(a, panels + i * depth, depth, count, tiles, nothing);
                else multiply_panel<false, false>(a, panels + i * depth, depth, count, tiles, nothing);
                for (int64_t j = 0; j < count; j += kColumns) {
                    turn_tile(tiles + j * kColumns, turned);
                    finish(i, rows_here, first + j, count - j < kColumns ? count - j : kColumns, turned);
                }
            }
        }
    });
}

// out = Finish(A B), with A as stored in the source (rows, depth) and B packed.
template <bool kPairs>
inline void multiply(const Source& a, const float* b, int64_t rows, int64_t depth, int64_t columns, const Finish& finish) {
    for_blocks_of_rows<kPairs>(rows, [&](int64_t first, int64_t count) {
        Frame frame;
        const PackedRows packed =
            pack_rows<kPairs>(a, first, count, 0, depth, frame.take(packed_rows_floats<kPairs>(count, depth)));
        multiply_block<kPairs, false>(packed, b, Engine<kPairs>::units(depth), first, count, columns, finish);
    });
}

// out (rows, columns) float = alpha AᵀB, with the sources A (depth, rows) and B (depth, columns).
template <bool kPairs>
inline void multiply_transposed(const Source& a, const Source& b, int64_t rows, int64_t depth, int64_t columns,
                                float alpha, float* out, int64_t stride) {
    Frame outer;
    const int64_t most = depth < kDepthBlock ? depth : kDepthBlock;
    float* packed_b = outer.take(packed_floats<kPairs>(most, columns));
    if (depth == 0)
        for (int64_t i = 0; i < rows; ++i) std::memset(out + i * stride, 0, size_t(columns) * 4);
    for (int64_t start = 0; start < depth; start += kDepthBlock) {
        const int64_t part = depth - start < kDepthBlock ? depth - start : kDepthBlock;
        const int64_t units = Engine<kPairs>::units(part);
        pack_matrix<kPairs>(b, false, start, part, columns, packed_b);
        for_blocks_of_rows<kPairs>(rows, [&](int64_t first, int64_t count) {
            Frame frame;
            const int64_t size = kPairs ? packed_rows_floats<kPairs>(count, part)
                                        : part * padded_stride(round_up(count, kRows));
            const PackedRows packed = pack_rows_transposed<kPairs>(a, first, count, start, part, frame.take(size));
            Finish finish;
            finish.out = {out, kFloat32, stride};
            finish.alpha = alpha;
            if (start > 0) finish.residual = Source(out, stride);  // the sums of the earlier blocks
            multiply_block<kPairs, !kPairs>(packed, packed_b, units, first, count, columns, finish);
        });
    }
}

}  // namespace crate::CRATE_ISA
