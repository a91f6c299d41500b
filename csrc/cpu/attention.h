// Subspace attention of one head. Query, key and value are one tensor. A pair of tiles (I, J), (J, I) therefore needs
// one product for its scores and one set of exponentials, and the backward has one output.
//
// Forward (arXiv 2306.01129, equation 11, with the symmetric softmax of docs/cpu.md): with c_i = scale |w_i|^2 / 2,
// E_ij = exp(scale w_i w_j - c_i - c_j) is symmetric and at most 1, and with u_j = exp(c_j - max c)
//   o_i = sum_j E_ij u_j v_j / sum_j E_ij u_j.
// Heads whose c_i differ too much, and queries that are not visible keys, take the softmax with a row maximum instead.
// Cross-attention is a head whose first tokens are only keys and whose other tokens are only queries.
//
// A head is cut into blocks of kTokens. A block E_IJ stays in the cache while it is used in both roles. Nothing of size
// N x N is stored. One thread computes a whole head, so no two threads add to one output.
#pragma once

#include <cmath>

#include "product.h"

namespace crate::CRATE_ISA {

constexpr int kTokens = 96;      // tokens of a block; a multiple of kRows and of kColumns
constexpr int kPairTokens = 256; // keys that a strip of bfloat16 queries attends to at a time; a multiple of kColumns
constexpr int kFewTokens = 32;   // up to this many tokens, tile registers are too empty to be faster
constexpr float kRange = 90.0f;  // largest difference of c_i, in powers of two, for which E_ij u_j cannot underflow
static_assert(kTokens % kRows == 0 && kTokens % kColumns == 0);

struct Head {
    const AttentionShape& shape;
    int64_t batch, index;

    int64_t visible() const {
        if (shape.lengths != nullptr) return static_cast<const int64_t*>(shape.lengths)[batch];
        return shape.first_query > 0 ? shape.first_query : shape.tokens;
    }
    Source rows(const Heads& h) const {
        Source s;
        s.data = static_cast<const char*>(h.data) + (batch * h.batch_stride + index * h.head_stride) * bytes_of(h.type);
        s.type = h.type, s.stride = h.token_stride;
        return s;
    }
    void write_row(const Heads& h, int64_t token, const float* values) const {
        write(h.data, h.type, batch * h.batch_stride + token * h.token_stride + index * h.head_stride, shape.width, values);
    }
    int64_t first_row() const { return (batch * shape.heads + index) * shape.tokens; }  // in lse
};

template <class F>
inline void for_heads(const AttentionShape& shape, F f) {
    parallel(shape.batch * shape.heads, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h) {
            Frame frame;
            f(Head{shape, h / shape.heads, h % shape.heads}, frame);
        }
    });
}

// kRows rows in the order in which the tile reads them.
struct Strip {
    const float* rows;
    int64_t stride;
};

// One head's tokens in the three orders in which the tile reads them.
struct Operand {
    Strip rows;      // A: token by token
    Strip last;      // A: the rows from `whole` on, followed by zeros
    int64_t whole;
    float* keys;     // B of scores: panels of kColumns tokens, channel by channel
    float* values;   // B of sums: panels of kColumns channels, token by token

    Strip strip(int64_t token) const {
        if (token >= whole) return {last.rows + (token - whole) * last.stride, last.stride};
        return {rows.rows + token * rows.stride, rows.stride};
    }
};

inline Operand take_operand(Frame& frame, int64_t tokens, int64_t width, bool keys, bool values) {
    Operand o{};
    if (keys) o.keys = frame.take(round_up(tokens, kColumns) * width);
    if (values) o.values = frame.take(tokens * round_up(width, kColumns));
    return o;
}

// The keys of block J begin at keys + J.first * width. A panel of values begins every `tokens * kColumns` floats.
inline void fill_keys(const Source& s, int64_t tokens, int64_t width, float* keys) {
    for (int64_t j = 0; j < tokens; j += kColumns)
        pack_panel_of_columns<false>(s, 0, width, j, tokens - j < kColumns ? tokens - j : kColumns, keys + j * width);
}

// Row i of the values is the source's row times factors[i], or times `factor`.
inline void fill_values(const Source& s, int64_t tokens, int64_t width, const float* factors, float factor, float* values) {
    Frame frame;
    const int64_t padded = round_up(width, kColumns);
    float* row = frame.take(padded);
    for (int64_t c = round_up(width, kLanes); c < padded; c += kLanes) store(row + c, Floats{});
    for (int64_t i = 0; i < tokens; ++i) {
        fetch(s, i, 0, width, row);
        const float times = factors == nullptr ? factor : factors[i];
        for (int64_t c = 0; c < padded; c += kColumns)
            for (int v = 0; v < kColumns; v += kLanes) store(values + c * tokens + i * kColumns + v, load(row + c + v) * times);
    }
}

// Sets the rows of an operand. The tile reads rows of floats in place. Rows are copied in four cases: other types, the
// last rows (the tile needs a full number of rows), rows whose distance maps them to the same cache lines, and rows
// that the caller will change.
inline void fill_rows(Frame& frame, const Source& s, int64_t tokens, int64_t width, bool copied, Operand& o) {
    copied = copied || !plain_floats(s) || s.stride * 4 % 4096 == 0;
    o.whole = copied ? 0 : tokens / kRows * kRows;
    if (!copied) o.rows = {float_row(s, 0, 0), s.stride};
    // Strips of queries after the visible tokens begin anywhere, so the last one may end one strip later.
    const int64_t stride = padded_stride(width), rows = round_up(tokens - o.whole, kRows) + (copied ? kRows : 0);
    float* copy = frame.take(rows * stride);
    o.last = {copy, stride};
    for (int64_t i = 0; i < rows; ++i) {
        float* row = copy + i * stride;
        if (o.whole + i >= tokens) {
            std::memset(row, 0, size_t(stride) * 4);
            continue;
        }
        prefetch(s, o.whole + (o.whole + i + kAhead < tokens ? i + kAhead : i), 0, width);
        fetch(s, o.whole + i, 0, width, row);
    }
}

inline Ints lane_numbers() {
    Ints n{};
    for (int l = 0; l < kLanes; ++l) n[l] = l;
    return n;
}

// The scalar product of two rows of floats.
inline float dot(const float* a, const float* b, int64_t count) {
    Floats total{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) total += load(a + i) * load(b + i);
    if (i < count) total += load_first(a + i, int(count - i)) * load_first(b + i, int(count - i));
    return sum(total);
}

// sums (rows of round_up(width, kColumns) floats) += A B with the values of tokens [first, first + depth) as B.
template <bool kTransposed>
inline void add_values(const float* a, int64_t stride, const float* values, int64_t tokens, int64_t first, int64_t depth,
                       int64_t width, float* sums, int64_t rows) {
    const int64_t row = round_up(width, kColumns);
    if (depth <= 0) return;
    for (int64_t c = 0; c < width; c += kColumns) {
        const float* panel = values + c * tokens + first * kColumns;
        if (rows == kRows) {
            multiply_tile<false, kTransposed>(a, stride, panel, depth, sums + c, row, true);
            continue;
        }
        alignas(64) float tile[kRows * kColumns];
        multiply_tile<false, kTransposed>(a, stride, panel, depth, tile);
        for (int64_t i = 0; i < rows; ++i)
            for (int v = 0; v < kColumns; v += kLanes) {
                float* p = sums + i * row + c + v;
                store(p, load(p) + load(tile + i * kColumns + v));
            }
    }
}

// -- forward -------------------------------------------------------------------------------------------------------

// Computes E of the block (I, J) and its part of the normalizers. On the diagonal only columns up to each tile's own
// rows are computed. The rest of a row is the transpose of the rows below.
inline void score_block(const Operand& w, int64_t width, int64_t i_first, int64_t i_count, int64_t j_first, int64_t j_count,
                        bool causal, float scale, const float* c, const float* u, float* e, int64_t stride,
                        float* normalizer) {
    const bool diagonal = i_first == j_first;
    const bool both = !causal;  // whether J attends to I, too
    const Ints lanes = lane_numbers();
    alignas(64) float tile[kRows * kColumns];
    for (int64_t i = 0; i < i_count; i += kRows) {
        const int64_t rows = i_count - i < kRows ? i_count - i : kRows;
        const int64_t seen = diagonal ? (i + rows < j_count ? i + rows : j_count) : j_count;
        const Strip a = w.strip(i_first + i);
        Floats row_sums[kRows];
        for (int r = 0; r < kRows; ++r) row_sums[r] = Floats{};
        for (int64_t j = 0; j < seen; j += kColumns) {
            multiply_tile<false, false>(a.rows, a.stride, w.keys + (j_first + j) * width, width, tile);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const int64_t column = j + v * kLanes;
                if (column >= seen) break;
                const Floats c_j = load(c + j_first + column), u_j = load(u + j_first + column);
                const Ints number = lanes + int32_t(column);
                const Ints counts = number < int32_t(seen);
                const Ints counts_for_j = number < int32_t(diagonal ? i : j_count);
                Floats column_sums{};
                for (int r = 0; r < rows; ++r) {
                    const Floats x = load(tile + r * kColumns + v * kLanes) * scale - (c_j + c[i_first + i + r]);
                    Floats value = select(counts, exp2(x), Floats{});
                    if (causal && diagonal) value = select(number <= int32_t(i + r), value, Floats{});
                    store(e + (i + r) * stride + column, value);
                    row_sums[r] += value * u_j;
                    column_sums += value * u[i_first + i + r];
                }
                if (both) {
                    float* n = normalizer + j_first + column;
                    store(n, load(n) + select(counts_for_j, column_sums, Floats{}));
                }
            }
        }
        for (int r = 0; r < rows; ++r) normalizer[i_first + i + r] += sum(row_sums[r]);
    }
}

// Rows [first, last) with a row maximum: queries of any norm and keys [0, visible).
inline void attend_rows(const Head& head, const Operand& w, const float* values, int64_t value_tokens,
                        int64_t first, int64_t last, int64_t visible, float scale, const float* log_u, const float* u,
                        const Heads& out, float* lse) {
    Frame frame;
    const int64_t width = head.shape.width, stride = padded_stride(round_up(visible, kColumns));
    const int64_t padded = round_up(width, kColumns);
    float* strip = frame.take(kRows * stride);
    float* sums = frame.take(kRows * padded);
    const Ints lanes = lane_numbers();
    alignas(64) float tile[kRows * kColumns];
    for (int64_t i = first; i < last; i += kRows) {
        const int64_t rows = last - i < kRows ? last - i : kRows;
        const Strip a = w.strip(i);
        const int64_t seen = head.shape.causal && i + rows < visible ? i + rows : visible;
        for (int64_t j = 0; j < seen; j += kColumns) {
            multiply_tile<false, false>(a.rows, a.stride, w.keys + j * width, width, tile);
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kColumns; v += kLanes) {
                    const Ints number = lanes + int32_t(j + v);
                    Ints hidden = number >= int32_t(seen);
                    if (head.shape.causal) hidden |= number > int32_t(i + r);
                    store(strip + r * stride + j + v,
                          select(hidden, broadcast(-INFINITY), load(tile + r * kColumns + v) * scale));
                }
        }
        std::memset(sums, 0, size_t(kRows * padded) * 4);
        float normalizers[kRows];
        for (int r = 0; r < kRows; ++r) {
            float* row = strip + r * stride;
            Floats most = broadcast(-INFINITY);
            for (int64_t j = 0; j < seen; j += kLanes) {
                const Floats x = load(row + j);
                most = x > most || x != x ? x : most;  // NaN is kept
            }
            float maximum = most[0];
            for (int l = 1; l < kLanes; ++l) maximum = most[l] > maximum || most[l] != most[l] ? most[l] : maximum;
            Floats total{};
            for (int64_t j = 0; j < seen; j += kLanes) {
                const Floats x = load(row + j);
                // Values contain the factor u_j, so the weights are divided by u_j, in the exponent.
                const Floats p = exp2(x - maximum - load(log_u + j));
                const Floats weight = select(x == -INFINITY, Floats{}, p);
                store(row + j, weight);
                total += weight * load(u + j);
            }
            normalizers[r] = sum(total);
            if (r < rows) lse[i + r] = (std::log2(normalizers[r]) + maximum) / kLog2E;
        }
        add_values<false>(strip, stride, values, value_tokens, 0, seen, width, sums, kRows);
        for (int r = 0; r < rows; ++r) {
            float* row = sums + r * padded;
            for (int64_t k = 0; k < width; k += kLanes) store(row + k, load(row + k) / normalizers[r]);
            head.write_row(out, i + r, row);
        }
    }
}

// The rows of a head as operands of products of pairs: A and B of the scores, and B of the sums.
template <bool kPairs>
inline PackedRows pair_rows(Frame& frame, const Source& s, int64_t tokens, int64_t width) {
    for (int64_t i = 0; i < tokens; ++i) prefetch(s, i, 0, width);
    return pack_rows<kPairs>(s, 0, tokens, 0, width, frame.take(packed_rows_floats<kPairs>(tokens, width)));
}
template <bool kPairs>
inline const float* pair_keys(Frame& frame, const Source& s, int64_t tokens, int64_t width) {
    const int64_t units = Engine<kPairs>::units(width);
    float* keys = frame.take(round_up(tokens, kColumns) * units);
    for (int64_t j = 0; j < tokens; j += kColumns)
        pack_panel_of_columns<kPairs>(s, 0, width, j, tokens - j < kColumns ? tokens - j : kColumns, keys + j * units);
    return keys;
}
template <bool kPairs>
inline const float* pair_values(Frame& frame, const Source& s, int64_t tokens, int64_t width) {
    float* values = frame.take(packed_floats<kPairs>(tokens, width));
    pack_units_of_rows<kPairs>(s, 0, tokens, width, 0, Engine<kPairs>::units(tokens), values);
    return values;
}

// scores (a strip of rows, `count` columns) = rows times keys, beginning with key `first`.
template <bool kPairs>
inline void score_strip(const PackedRows& rows, int64_t row, const float* keys, int64_t units, int64_t first, int64_t count,
                        float* scores) {
    for (int64_t j = 0; j < count; j += kColumns)
        multiply_chain<kPairs, false>(rows.data + row * rows.stride, rows.stride, keys + (first + j) * units, units,
                                      scores + j, kPairTokens, false);
}

constexpr int64_t kWeightStride = kPairTokens / 2 + 16;  // of a strip of weights, in pairs

// sums = or += weights times the values of `count` tokens, beginning with token `first`.
template <bool kPairs>
inline void sum_strip(const float* weights, const float* values, int64_t token_units, int64_t first, int64_t count,
                      int64_t width, float* sums, bool add) {
    for (int64_t column = 0; column < width; column += kColumns)
        multiply_chain<kPairs, false>(weights, kWeightStride, values + column * token_units + first / 2 * kColumns,
                                      Engine<kPairs>::units(count), sums + column, round_up(width, kColumns), add);
}

// The log-normalizers, as natural logarithms: log(normalizer_i) + c_i + max c. All inputs are read in whole vectors.
inline void write_lse(const float* normalizer, const float* c, float most, int64_t tokens, float* lse) {
    for (int64_t i = 0; i < tokens; i += kLanes) {
        const Floats value = (log2(load(normalizer + i)) + load(c + i) + most) * (1 / kLog2E);
        if (tokens - i < kLanes) store_first(lse + i, value, int(tokens - i));
        else store(lse + i, value);
    }
}

// The queries that are also keys, with products of pairs of bfloat16: P_ij = exp(scale w_i w_j - c_i - max c). The
// symmetry of the scores is not used, because a product in tile registers takes less time than the transpose of a tile.
// Returns false without computing anything if the c_i of the head differ too much.
template <bool kPairs>
inline bool attend_pairs(const Head& head, const AttentionForward& call, const Source& w, const Source& value,
                         int64_t visible, float scale, float* lse) {
    constexpr int kStrip = Engine<kPairs>::rows;
    Frame frame;
    const int64_t width = head.shape.width, padded = round_up(width, kColumns);
    const int64_t units = Engine<kPairs>::units(width), token_units = Engine<kPairs>::units(visible);
    const PackedRows rows = pair_rows<kPairs>(frame, w, visible, width);
    float* c = frame.take(round_up(visible, kStrip) + kLanes);
    float* normalizer = frame.take(round_up(visible, kStrip) + kLanes);
    float most = -INFINITY, least = INFINITY;
    for (int64_t i = 0; i < visible; ++i) {
        c[i] = 0.5f * scale * square_of_pairs(rows.data + i * rows.stride, units);
        if (!std::isfinite(c[i])) return false;
        most = c[i] > most ? c[i] : most;
        least = c[i] < least ? c[i] : least;
    }
    if (!(scale > 0 && most - least <= kRange)) return false;
    for (int64_t i = visible; i < round_up(visible, kStrip); ++i) c[i] = 0;

    const float* keys = pair_keys<kPairs>(frame, w, visible, width);
    const float* values = pair_values<kPairs>(frame, value, visible, width);
    float* scores = frame.take(kStrip * kPairTokens);
    float* weights = frame.take(kStrip * kWeightStride);
    float* sums = frame.take(kStrip * padded);
    const Ints lanes = lane_numbers();
    TileRegisters registers;
    for (int64_t i = 0; i < visible; i += kStrip) {
        const int64_t count = visible - i < kStrip ? visible - i : kStrip;
        const int64_t seen = head.shape.causal ? i + count : visible;
        for (int64_t r = 0; r < count; ++r) prefetch(head.rows(call.out), i + r, 0, width);
        for (int64_t r = 0; r < kStrip; ++r) normalizer[i + r] = 0;
        for (int64_t first = 0; first < seen; first += kPairTokens) {
            const int64_t keys_here = seen - first < kPairTokens ? seen - first : kPairTokens;
            score_strip<kPairs>(rows, i, keys, units, first, keys_here, scores);
            for (int64_t r = 0; r < kStrip; ++r) {
                const float shift = c[i + r] + most;
                const int64_t mine = head.shape.causal && i + r + 1 < seen ? i + r + 1 - first : keys_here;
                Floats total{};
                for (int64_t j = 0; j < keys_here; j += 2 * kLanes) {
                    Floats p[2];
                    for (int v = 0; v < 2; ++v) {
                        const int64_t column = j + v * kLanes;
                        p[v] = exp2_of_weight(load(scores + r * kPairTokens + column) * scale - shift);
                        if (column + kLanes > mine) p[v] = select(lanes < int32_t(mine - column), p[v], Floats{});
                        total += p[v];
                    }
                    store_pairs(weights + r * kWeightStride + j / 2, p[0], p[1]);
                }
                normalizer[i + r] += sum(total);
            }
            sum_strip<kPairs>(weights, values, token_units, first, keys_here, width, sums, first > 0);
        }
        for (int64_t r = 0; r < count; ++r) {
            const float share = 1.0f / normalizer[i + r];
            for (int64_t k = 0; k < padded; k += kLanes) store(sums + r * padded + k, load(sums + r * padded + k) * share);
            head.write_row(call.out, i + r, sums + r * padded);
        }
    }
    write_lse(normalizer, c, most, visible, lse);
    return true;
}

inline void attend(const Head& head, Frame& frame, const AttentionForward& call) {
    const int64_t tokens = head.shape.tokens, width = head.shape.width, visible = head.visible();
    const Source w_source = head.rows(call.w), value_source = head.rows(call.value);
    const Source& v_source = call.value.data == nullptr ? w_source : value_source;
    const float scale = float(head.shape.scale) * kLog2E;
    float* lse = call.lse + head.first_row();
    bool keys_done = false;  // whether the outputs of the queries that are also keys are complete
    if constexpr (kHasTiles)
        if (head.shape.low_precision && head.shape.first_query == 0 && visible > kFewTokens)
            keys_done = attend_pairs<true>(head, call, w_source, v_source, visible, scale, lse);
    if (keys_done && visible == tokens) return;
    for (int64_t i = 0; i < visible; ++i) prefetch(w_source, i, 0, width);
    Operand w = take_operand(frame, tokens, width, true, true);
    const int64_t padded = round_up(visible, kColumns) + kColumns;
    float* c = frame.take(round_up(tokens, kRows) + 2 * kColumns);
    float* u = frame.take(padded);
    float* log_u = frame.take(padded);
    // Queries after the visible tokens begin their own strips. A strip must not contain tokens before and after this
    // limit.
    fill_rows(frame, w_source, tokens, width, visible < tokens, w);
    fill_keys(w_source, visible, width, w.keys);

    Floats mosts = broadcast(-INFINITY), leasts = broadcast(INFINITY);
    bool finite = true;
    const Ints lanes = lane_numbers();
    for (int64_t i = 0; i < round_up(tokens, kRows) + kColumns; ++i) c[i] = 0;
    for (int64_t panel = 0; panel < visible; panel += kColumns) {  // |w_i|^2, one panel of tokens at a time
        Floats squares[kVectors] = {};
        for (int64_t k = 0; k < width; ++k)
            for (int v = 0; v < kVectors; ++v) {
                const Floats key = load(w.keys + panel * width + k * kColumns + v * kLanes);
                squares[v] += key * key;
            }
        for (int v = 0; v < kVectors; ++v) {
            const int64_t i = panel + v * kLanes;
            const Floats x = squares[v] * (0.5f * scale);
            const Ints present = lanes < int32_t(visible - i);
            mosts = max(mosts, select(present, x, mosts));
            leasts = select(present & (x < leasts), x, leasts);
            finite = finite && std::isfinite(sum(x));
            store(c + i, select(present, x, Floats{}));
        }
    }
    float most = mosts[0], least = leasts[0];
    for (int l = 1; l < kLanes; ++l) {
        most = mosts[l] > most ? mosts[l] : most;
        least = leasts[l] < least ? leasts[l] : least;
    }
    const int64_t first_query = keys_done ? visible : head.shape.first_query;
    const bool bounded = finite && scale > 0 && most - least <= kRange && first_query == 0;  // the queries are keys
    for (int64_t i = 0; i < padded; ++i) log_u[i] = u[i] = 0;
    for (int64_t i = 0; i < visible; ++i) log_u[i] = bounded ? c[i] - most : 0.0f;
    for (int64_t i = 0; i < visible; i += kLanes) store(u + i, exp2(load(log_u + i)));
    fill_values(v_source, visible, width, u, 1.0f, w.values);

    if (!bounded) {
        attend_rows(head, w, w.values, visible, first_query, tokens, visible, scale, log_u, u, call.out, lse);
        return;
    }
    const int64_t row = round_up(width, kColumns), stride = padded_stride(kTokens);
    float* e = frame.take(kTokens * stride);
    float* sums = frame.take(round_up(visible, kRows) * row);
    float* normalizer = frame.take(padded);
    std::memset(sums, 0, size_t(round_up(visible, kRows) * row) * 4);
    std::memset(normalizer, 0, size_t(padded) * 4);
    const bool causal = head.shape.causal;
    for (int64_t I = 0; I < visible; I += kTokens) {
        const int64_t i_count = visible - I < kTokens ? visible - I : kTokens;
        for (int64_t J = 0; J <= I; J += kTokens) {
            const int64_t j_count = visible - J < kTokens ? visible - J : kTokens;
            score_block(w, width, I, i_count, J, j_count, causal, scale, c, u, e, stride, normalizer);
            for (int64_t i = 0; i < i_count; i += kRows) {
                const int64_t rows = i_count - i < kRows ? i_count - i : kRows;
                float* row_sums = sums + (I + i) * row;
                const int64_t seen = I == J ? i + rows : j_count;
                add_values<false>(e + i * stride, stride, w.values, visible, J, seen, width, row_sums, rows);
                if (I == J && !causal)  // the rest of the row is the transpose of the rows below
                    add_values<true>(e + seen * stride + i, stride, w.values, visible, I + seen, i_count - seen, width,
                                     row_sums, rows);
            }
            if (I != J && !causal)
                for (int64_t j = 0; j < j_count; j += kRows)
                    add_values<true>(e + j, stride, w.values, visible, I, i_count, width, sums + (J + j) * row, kRows);
        }
    }
    write_lse(normalizer, c, most, visible, lse);
    for (int64_t i = 0; i < visible; i += kLanes) store(normalizer + i, 1.0f / load(normalizer + i));
    const Source out = head.rows(call.out);
    for (int64_t i = 0; i < visible; ++i) {
        prefetch(out, i + kAhead < visible ? i + kAhead : i, 0, width);
        float* values = sums + i * row;
        for (int64_t k = 0; k < width; k += kLanes) store(values + k, load(values + k) * normalizer[i]);
        head.write_row(call.out, i, values);
    }
    if (visible < tokens) {
        attend_rows(head, w, w.values, visible, visible, tokens, visible, scale, log_u, u, call.out, lse);
    }
}

// -- backward ------------------------------------------------------------------------------------------------------

// dS = P (g v - delta), dw_i = sum_j scale (dS_ij + dS_ji) w_j, dv_i = sum_j P_ji g_j. Without a value, dw gets both
// sums.

// Backward with products of pairs, if every token is key and query. A strip of tokens computes all terms of its rows,
// as queries and as keys, so no two strips add to one row.
template <bool kPairs>
inline void attend_backward_pairs(const Head& head, const AttentionBackward& call) {
    constexpr int kStrip = Engine<kPairs>::rows;
    Frame frame;
    const int64_t tokens = head.shape.tokens, width = head.shape.width, padded = round_up(width, kColumns);
    const int64_t units = Engine<kPairs>::units(width), token_units = Engine<kPairs>::units(tokens);
    const bool causal = head.shape.causal, shared = call.value.data == nullptr;
    const float scale = float(head.shape.scale);
    const Source w_source = head.rows(call.w), g_source = head.rows(call.grad), o_source = head.rows(call.out);
    const Source value_source = head.rows(call.value);
    const PackedRows w_rows = pair_rows<kPairs>(frame, w_source, tokens, width);
    const PackedRows g_rows = pair_rows<kPairs>(frame, g_source, tokens, width);
    const PackedRows v_rows = shared ? w_rows : pair_rows<kPairs>(frame, value_source, tokens, width);
    const float* w_keys = pair_keys<kPairs>(frame, w_source, tokens, width);
    const float* g_keys = pair_keys<kPairs>(frame, g_source, tokens, width);
    const float* v_keys = shared ? w_keys : pair_keys<kPairs>(frame, value_source, tokens, width);
    const float* w_values = pair_values<kPairs>(frame, w_source, tokens, width);
    const float* g_values = pair_values<kPairs>(frame, g_source, tokens, width);
    float* lse = frame.take(tokens + kPairTokens);
    float* delta = frame.take(tokens + kPairTokens);
    float* g_row = frame.take(padded);
    float* o_row = frame.take(padded);
    for (int64_t i = 0; i < tokens; ++i) {
        prefetch(o_source, i + kAhead < tokens ? i + kAhead : i, 0, width);
        fetch(g_source, i, 0, width, g_row);
        fetch(o_source, i, 0, width, o_row);
        delta[i] = dot(g_row, o_row, width);
        lse[i] = call.lse[head.first_row() + i] * kLog2E;
    }
    for (int64_t i = tokens; i < tokens + kPairTokens; ++i) delta[i] = lse[i] = 0;

    float* scores = frame.take(kStrip * kPairTokens);
    float* down = frame.take(kStrip * kPairTokens);  // g_i v_j
    float* up = frame.take(kStrip * kPairTokens);    // v_i g_j
    float* ds = frame.take(kStrip * kWeightStride);
    float* p = frame.take(kStrip * kWeightStride);
    float* dw = frame.take(kStrip * padded);
    float* dv = shared ? dw : frame.take(kStrip * padded);
    const Ints lanes = lane_numbers();
    TileRegisters registers;
    for (int64_t i = 0; i < tokens; i += kStrip) {
        const int64_t count = tokens - i < kStrip ? tokens - i : kStrip;
        for (int64_t first = 0; first < tokens; first += kPairTokens) {
            const int64_t here = tokens - first < kPairTokens ? tokens - first : kPairTokens;
            score_strip<kPairs>(w_rows, i, w_keys, units, first, here, scores);
            score_strip<kPairs>(g_rows, i, v_keys, units, first, here, down);
            score_strip<kPairs>(v_rows, i, g_keys, units, first, here, up);
            for (int64_t r = 0; r < kStrip; ++r) {
                const float lse_i = lse[i + r], delta_i = delta[i + r];
                for (int64_t j = 0; j < here; j += 2 * kLanes) {
                    Floats both[2], as_key[2];
                    for (int v = 0; v < 2; ++v) {
                        const int64_t at = r * kPairTokens + j + v * kLanes, column = first + j + v * kLanes;
                        const Floats s = load(scores + at) * (scale * kLog2E);
                        Floats query = exp2_of_weight(at_most(s - lse_i, 0));
                        Floats key = exp2_of_weight(at_most(s - load(lse + column), 0));
                        Floats from_query = query * (load(down + at) - delta_i);
                        Floats from_key = key * (load(up + at) - load(delta + column));
                        if (causal || column + kLanes > tokens) {
                            const Ints number = lanes + int32_t(column), there = number < int32_t(tokens);
                            const Ints sees = causal ? there & (number <= int32_t(i + r)) : there;
                            const Ints seen = causal ? there & (number >= int32_t(i + r)) : there;
                            from_query = select(sees, from_query, Floats{});
                            from_key = select(seen, from_key, Floats{});
                            key = select(seen, key, Floats{});
                        }
                        both[v] = (from_query + from_key) * scale;
                        as_key[v] = key;
                    }
                    store_pairs(ds + r * kWeightStride + j / 2, both[0], both[1]);
                    store_pairs(p + r * kWeightStride + j / 2, as_key[0], as_key[1]);
                }
            }
            sum_strip<kPairs>(ds, w_values, token_units, first, here, width, dw, first > 0);
            sum_strip<kPairs>(p, g_values, token_units, first, here, width, dv, shared || first > 0);
        }
        for (int64_t r = 0; r < count; ++r) {
            head.write_row(call.dw, i + r, dw + r * padded);
            if (!shared) head.write_row(call.dvalue, i + r, dv + r * padded);
        }
    }
}

// Backward with products of floats. The scores of two blocks (I, J) and (J, I) are computed once.
inline void attend_backward(const Head& head, Frame& frame, const AttentionBackward& call) {
    if constexpr (kHasTiles)
        if (head.shape.low_precision && head.shape.first_query == 0 && head.visible() == head.shape.tokens &&
            head.shape.tokens > kFewTokens)
            return attend_backward_pairs<true>(head, call);
    const int64_t tokens = head.shape.tokens, width = head.shape.width, visible = head.visible();
    const bool causal = head.shape.causal, shared = call.value.data == nullptr;
    const float scale = float(head.shape.scale);
    const Source w_source = head.rows(call.w), g_source = head.rows(call.grad), o_source = head.rows(call.out);
    const Source value_source = head.rows(call.value);
    const Source& v_source = shared ? w_source : value_source;
    Operand w = take_operand(frame, tokens, width, true, true);  // values times scale
    Operand g = take_operand(frame, tokens, width, true, true);
    Operand v = shared ? Operand{} : take_operand(frame, tokens, width, true, false);
    const int64_t padded_tokens = round_up(tokens, kRows) + kColumns, row = round_up(width, kColumns);
    float* delta = frame.take(padded_tokens);
    float* lse = frame.take(padded_tokens);
    float* o = frame.take(row);
    for (int64_t i = 0; i < padded_tokens; ++i) delta[i] = lse[i] = 0;
    const bool hides = visible < tokens;
    fill_rows(frame, w_source, tokens, width, hides, w);
    fill_rows(frame, g_source, tokens, width, hides, g);
    if (shared) v = w;
    else fill_rows(frame, v_source, tokens, width, hides, v);
    for (int64_t i = 0; i < tokens; ++i) {
        const float* g_row = g.strip(i).rows;
        const float* o_row = o;
        prefetch(o_source, i + kAhead < tokens ? i + kAhead : i, 0, width);
        if (plain_floats(o_source)) o_row = float_row(o_source, i, 0);
        else fetch(o_source, i, 0, width, o);
        delta[i] = dot(g_row, o_row, width);
        lse[i] = call.lse[head.first_row() + i] * kLog2E;
        if (i < visible) continue;
        // A hidden token without a gradient contributes nothing, whatever its values are.
        bool zero = true;
        for (int64_t k = 0; k < width; ++k) zero = zero && g_row[k] == 0;
        if (!zero) continue;
        delta[i] = lse[i] = 0;
        std::memset(const_cast<float*>(w.strip(i).rows), 0, size_t(width) * 4);  // a copy, since there are hidden tokens
        std::memset(const_cast<float*>(v.strip(i).rows), 0, size_t(width) * 4);
    }
    fill_keys(w_source, visible, width, w.keys);
    if (!shared) fill_keys(v_source, visible, width, v.keys);
    fill_keys(g_source, visible, width, g.keys);
    fill_values(hides ? Source(w.last.rows, w.last.stride) : w_source, tokens, width, nullptr, scale, w.values);
    fill_values(g_source, tokens, width, nullptr, 1.0f, g.values);

    const int64_t stride = padded_stride(kTokens);
    float* ds = frame.take(kTokens * stride);       // dS_ij + dS_ji
    float* p = frame.take(kTokens * stride);        // P_ij
    float* p_other = frame.take(kTokens * stride);  // P_ji
    float* dw = frame.take(round_up(tokens, kRows) * row);
    float* dv = shared ? dw : frame.take(round_up(tokens, kRows) * row);
    std::memset(dw, 0, size_t(round_up(tokens, kRows) * row) * 4);
    if (!shared) std::memset(dv, 0, size_t(round_up(tokens, kRows) * row) * 4);
    alignas(64) float scores[kRows * kColumns], down[kRows * kColumns], up[kRows * kColumns];
    const Ints lanes = lane_numbers();

    // Tokens from `visible` on are only queries. New blocks begin there.
    for (int64_t I = head.shape.first_query; I < tokens;) {
        const bool hidden = I >= visible;
        const int64_t end = hidden ? tokens : visible;
        const int64_t i_count = end - I < kTokens ? end - I : kTokens;
        for (int64_t J = 0; J <= I && J < visible; J += kTokens) {
            const int64_t j_count = visible - J < kTokens ? visible - J : kTokens;
            const bool diagonal = I == J, both = !causal && !hidden;  // both: J attends to I, too
            for (int64_t i = 0; i < i_count; i += kRows) {
                const int64_t rows = i_count - i < kRows ? i_count - i : kRows;
                const int64_t seen = diagonal ? i + rows : j_count;
                const Strip w_rows = w.strip(I + i), g_rows = g.strip(I + i), v_rows = v.strip(I + i);
                for (int64_t j = 0; j < seen; j += kColumns) {
                    multiply_tile<false, false>(w_rows.rows, w_rows.stride, w.keys + (J + j) * width, width, scores);
                    multiply_tile<false, false>(g_rows.rows, g_rows.stride, v.keys + (J + j) * width, width, down);
                    if (both || diagonal)
                        multiply_tile<false, false>(v_rows.rows, v_rows.stride, g.keys + (J + j) * width, width, up);
                    for (int vector = 0; vector < kVectors; ++vector) {
                        const int64_t column = j + vector * kLanes;
                        if (column >= seen) break;
                        const Floats lse_j = load(lse + J + column), delta_j = load(delta + J + column);
                        const Ints number = lanes + int32_t(column), counts = number < int32_t(seen);
                        for (int r = 0; r < rows; ++r) {
                            const int at = r * kColumns + vector * kLanes;
                            const Floats s = load(scores + at) * (scale * kLog2E);
                            Ints forward = counts, backward = counts;  // i attends to j, j attends to i
                            if (causal && diagonal) {
                                forward &= number <= int32_t(i + r);
                                backward &= number >= int32_t(i + r);
                            }
                            // Large scores differ from their normalizer by rounding. The limit keeps this difference
                            // out of the exponential.
                            const Floats p_ij = select(forward, exp2(at_most(s - lse[I + i + r], 0)), Floats{});
                            Floats sum = select(forward, p_ij * (load(down + at) - delta[I + i + r]), Floats{});
                            if (both || diagonal) {
                                const Floats p_ji = select(backward, exp2(at_most(s - lse_j, 0)), Floats{});
                                sum += select(backward, p_ji * (load(up + at) - delta_j), Floats{});
                                store(p_other + (i + r) * stride + column, p_ji);
                            }
                            store(p + (i + r) * stride + column, p_ij);
                            store(ds + (i + r) * stride + column, sum);
                        }
                    }
                }
            }
            for (int64_t i = 0; i < i_count; i += kRows) {
                const int64_t rows = i_count - i < kRows ? i_count - i : kRows;
                const int64_t seen = diagonal ? i + rows : j_count;
                float* dw_row = dw + (I + i) * row;
                float* dv_row = dv + (I + i) * row;
                add_values<false>(ds + i * stride, stride, w.values, tokens, J, seen, width, dw_row, rows);
                if (both || diagonal)
                    add_values<false>(p_other + i * stride, stride, g.values, tokens, J, seen, width, dv_row, rows);
                if (diagonal) {
                    const int64_t rest = i_count - seen;
                    add_values<true>(ds + seen * stride + i, stride, w.values, tokens, I + seen, rest, width, dw_row, rows);
                    add_values<true>(p + seen * stride + i, stride, g.values, tokens, I + seen, rest, width, dv_row, rows);
                }
            }
            if (!diagonal)
                for (int64_t j = 0; j < j_count; j += kRows) {
                    const int64_t rows = j_count - j < kRows ? j_count - j : kRows;
                    add_values<true>(ds + j, stride, w.values, tokens, I, i_count, width, dw + (J + j) * row, rows);
                    add_values<true>(p + j, stride, g.values, tokens, I, i_count, width, dv + (J + j) * row, rows);
                }
        }
        I += i_count;
    }
    for (int64_t i = 0; i < tokens; ++i) {
        head.write_row(call.dw, i, dw + i * row);
        if (!shared) head.write_row(call.dvalue, i, dv + i * row);
    }
}

inline void attention_forward(const AttentionForward& call) {
    for_heads(call.shape, [&](const Head& head, Frame& frame) { attend(head, frame, call); });
}

inline void attention_backward(const AttentionBackward& call) {
    for_heads(call.shape, [&](const Head& head, Frame& frame) { attend_backward(head, frame, call); });
}

}  // namespace crate::CRATE_ISA
