// A CRATE layer, forward and backward: z' = z + step MSSA(LN z), z" = relu(LN z' + eta LN(z') M - eta lambda) with the
// folded dictionary M = W - WᵀW. Norms and elementwise operations run when a product reads or writes its tiles.
#pragma once

#include <cmath>

#include "attention.h"

namespace crate::CRATE_ISA {

// A parameter vector as floats, followed by zeros, so that whole panels can be read. Null if it is absent.
inline float* vector(Frame& frame, const Array& a, int64_t count, float factor = 1.0f) {
    if (a.data == nullptr) return nullptr;
    const int64_t padded = round_up(count, kColumns) + kLanes;
    float* out = frame.take(padded);
    for (int64_t i = 0; i < padded; i += kLanes) store(out + i, Floats{});
    read(a.data, a.type, 0, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] *= factor;
    return out;
}

struct Norm {
    const float *gamma = nullptr, *beta = nullptr;
    double eps = 0;
    float *mean = nullptr, *rstd = nullptr;
    Norm() = default;
    Norm(Frame& frame, const NormParameters& p, int64_t width, const float* row_mean, const float* row_rstd)
        : gamma(vector(frame, p.weight, width)),
          beta(vector(frame, p.bias, width)),
          eps(p.eps),
          mean(const_cast<float*>(row_mean)),
          rstd(const_cast<float*>(row_rstd)) {}
    void keep_statistics(Frame& frame, int64_t rows) {  // if the caller does not request them
        if (mean == nullptr) mean = frame.take(rows), rstd = frame.take(rows);
    }
    explicit operator bool() const { return gamma != nullptr; }
    Source of(const Source& s) const { return gamma == nullptr ? s : s.normalized(mean, rstd, gamma, beta); }
};

// The sum of term(k) over k = 0, kLanes, ... below `end`, in four chains. A single chain would wait for each addition.
template <class Term>
inline Floats sum_of_vectors(int64_t end, Term term) {
    Floats chains[4] = {};
    int64_t k = 0;
    for (; k + 4 * kLanes <= end; k += 4 * kLanes)
        for (int c = 0; c < 4; ++c) chains[c] += term(k + c * kLanes);
    for (; k < end; k += kLanes) chains[0] += term(k);
    return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// Mean and 1 / sqrt(variance + eps) of rows [first, first + count).
inline void row_statistics(const Source& s, int64_t first, int64_t count, int64_t width, const Norm& norm) {
    Frame frame;
    float* buffer = frame.take(round_up(width, kLanes));
    const Ints lanes = lane_numbers();
    const bool direct = plain_floats(s) && width % kLanes == 0;
    const int64_t whole = width / kLanes * kLanes;
    const float share = 1.0f / float(width), eps = float(norm.eps);
    for (int64_t i = first; i < first + count; ++i) {
        const float* row = direct ? float_row(s, i, 0) : buffer;
        if (!direct) read(s.data, s.type, i * s.stride, width, buffer);
        const float mean = sum(sum_of_vectors(width, [&](int64_t k) { return load(row + k); })) * share;
        Floats squares = sum_of_vectors(whole, [&](int64_t k) {
            const Floats x = load(row + k) - mean;
            return x * x;
        });
        if (whole < width) {
            const Floats x = select(lanes < int32_t(width - whole), load(row + whole) - mean, Floats{});
            squares += x * x;
        }
        norm.mean[i] = mean;
        norm.rstd[i] = sum(squares) * share;
    }
    for (int64_t i = first; i < first + count; ++i) norm.rstd[i] = 1.0f / std::sqrt(norm.rstd[i] + eps);
}

// -- folding -------------------------------------------------------------------------------------------------------

// M = W - WᵀW as floats. WᵀW is symmetric: its lower half is computed, and the upper half is copied.
template <bool kPairs>
inline void fold_dictionary(const Source& w, int64_t width, float* out, int64_t stride) {
    Frame outer;
    float* packed = outer.take(packed_floats<kPairs>(width, width));
    const int64_t units = Engine<kPairs>::units(width);
    pack_matrix<kPairs>(w, false, 0, width, width, packed);
    Finish finish;
    finish.out = {out, kFloat32, stride};
    const int64_t blocks = (width + kBlockRows - 1) / kBlockRows;
    parallel(blocks, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t block = b % 2 ? blocks - 1 - b / 2 : b / 2;  // short and long blocks in turn, for equal work
            const int64_t first = block * kBlockRows, count = width - first < kBlockRows ? width - first : kBlockRows;
            Frame frame;
            const int64_t size = kPairs ? packed_rows_floats<kPairs>(count, width)
                                        : width * padded_stride(round_up(count, kRows));
            const PackedRows a = pack_rows_transposed<kPairs>(w, first, count, 0, width, frame.take(size));
            const int64_t columns = round_up(first + count, kColumns) < width ? round_up(first + count, kColumns) : width;
            multiply_block<kPairs, !kPairs>(a, packed, units, first, count, columns, finish);
        }
    });
    // out contains WᵀW where column <= row (and a little more). The squares of a vector are swapped with their mirror
    // images.
    const int64_t squares = (width + kLanes - 1) / kLanes;
    parallel(squares, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t i = (b % 2 ? squares - 1 - b / 2 : b / 2) * kLanes;
            for (int64_t j = 0; j <= i; j += kLanes) {
                const int64_t rows = width - i < kLanes ? width - i : kLanes, columns = width - j < kLanes ? width - j : kLanes;
                Floats v[kLanes];
                alignas(64) float buffer[kLanes];
                for (int r = 0; r < kLanes; ++r) {
                    v[r] = Floats{};
                    if (r >= rows) continue;
                    read(out, kFloat32, (i + r) * stride + j, columns, buffer);
                    v[r] = load(buffer);
                    if (i == j) continue;
                    fetch(w, i + r, j, columns, buffer);
                    store(buffer, load(buffer) - v[r]);
                    write(out, kFloat32, (i + r) * stride + j, columns, buffer);
                }
                if (i == j)  // only the tiles below the diagonal are complete: mirror within the square
                    for (int r = 0; r < kLanes; ++r)
                        for (int c = r + 1; c < kLanes; ++c) v[r][c] = v[c][r];
                else
                    transpose(v);
                for (int c = 0; c < columns; ++c) {
                    fetch(w, j + c, i, rows, buffer);
                    store(buffer, load(buffer) - v[c]);
                    write(out, kFloat32, (j + c) * stride + i, rows, buffer);
                }
            }
        }
    });
}

// The folded matrix for a call, packed as B. `transposed` is for the gradient.
template <bool kPairs>
inline const float* packed_fold(Frame& frame, const LayerWeights& weights, int64_t width, bool transposed) {
    if (!transposed && weights.packed_folded != nullptr) return static_cast<const float*>(weights.packed_folded);
    Source folded(weights.folded);
    if (folded.data == nullptr) {
        float* m = frame.take(width * width);
        fold_dictionary<kPairs>(weights.dictionary, width, m, width);
        folded = Source(m, width);
    }
    float* packed = frame.take(packed_floats<kPairs>(width, width));
    pack_matrix<kPairs>(folded, transposed, 0, width, width, packed);
    return packed;
}

// -- forward -------------------------------------------------------------------------------------------------------

inline Heads heads_of(void* data, int64_t type, const AttentionShape& shape) {
    const int64_t inner = shape.heads * shape.width;
    return {data, type, shape.tokens * inner, inner, shape.width};
}

// z + step o, if attention has no output projection.
inline void add_attention(const LayerForward& call, int64_t first, int64_t count, const MutableArray& to) {
    Frame frame;
    const int64_t width = call.shape.width;
    const float step = float(call.shape.mssa_step_size);
    float* o = frame.take(round_up(width, kLanes));
    float* z = frame.take(round_up(width, kLanes));
    for (int64_t i = first; i < first + count; ++i) {
        read(call.o.data, call.o.type, i * call.o.stride, width, o);
        read(call.z.data, call.z.type, i * call.z.stride, width, z);
        for (int64_t k = 0; k < width; k += kLanes) store(z + k, load(z + k) + load(o + k) * step);
        write(to.data, to.type, i * to.stride, width, z);
    }
}

inline void attend_tokens(const LayerForward& call, Frame& frame) {
    const AttentionShape& attention = call.shape.attention;
    AttentionForward attend_call{};
    attend_call.shape = attention;
    attend_call.w = heads_of(call.w.data, call.w.type, attention);
    attend_call.out = heads_of(call.o.data, call.o.type, attention);
    attend_call.lse = call.lse != nullptr ? call.lse : frame.take(attention.batch * attention.heads * attention.tokens);
    attention_forward(attend_call);
}

// z" = relu(x + eta product - eta lambda), the last operations of an ISTA step.
inline Finish ista_finish(const LayerForward& call, const Source& x) {
    Finish step;
    step.out = call.out;
    step.alpha = float(call.shape.step_size);
    step.residual = x;
    step.shift = float(call.shape.step_size * call.shape.lambd);
    step.relu = true;
    return step;
}

// Whether multiply_few_rows can compute the call: float32 weights that are not packed, and few rows.
inline bool has_few_rows(const LayerForward& call) {
    const LayerWeights& weights = call.weights;
    const int64_t rows = call.shape.attention.batch * call.shape.attention.tokens;
    const bool mssa = call.halves & 1, ista = call.halves & 2;
    if (2 * rows >= call.shape.width) return false;
    if (mssa && (weights.packed_projection != nullptr || weights.packed_output != nullptr ||
                 weights.projection.type != kFloat32 || weights.output.type != kFloat32))
        return false;
    return !ista || (weights.packed_folded == nullptr && weights.folded.data == nullptr && weights.dictionary.type == kFloat32);
}

// z" = relu(x + eta (x - x Wᵀ) W - eta lambda) without folding, which would cost more than all products of few rows.
inline void forward_few_rows(const LayerForward& call) {
    const LayerShape& shape = call.shape;
    const LayerWeights& weights = call.weights;
    const int64_t width = shape.width, inner = shape.attention.heads * shape.attention.width;
    const int64_t rows = shape.attention.batch * shape.attention.tokens, padded = round_up(width, kColumns);
    const bool mssa = call.halves & 1, ista = call.halves & 2;
    Frame frame;
    Source middle = call.z;
    if (mssa) {
        Norm norm(frame, weights.mssa_norm, width, call.mean_1, call.rstd_1);
        norm.keep_statistics(frame, rows);
        row_statistics(call.z, 0, rows, width, norm);
        Finish projected;
        projected.out = call.w;
        multiply_few_rows(norm.of(call.z), weights.projection, false, rows, width, inner, projected);
        attend_tokens(call, frame);
        MutableArray to = call.out;
        if (ista) {
            to = {frame.take(rows * padded), kFloat32, padded};
            middle = Source(to);
        }
        if (weights.output.data != nullptr) {
            Finish residual;
            residual.out = to;
            residual.alpha = float(shape.mssa_step_size);
            residual.residual = call.z;
            residual.bias = vector(frame, weights.output_bias, width, residual.alpha);
            multiply_few_rows(call.o, weights.output, false, rows, inner, width, residual);
        } else {
            add_attention(call, 0, rows, to);
        }
        if (ista && call.middle.data != nullptr)
            for (int64_t i = 0; i < rows; ++i)
                write(call.middle.data, call.middle.type, i * call.middle.stride, width, float_row(middle, i, 0));
    }
    if (!ista) return;
    Norm norm(frame, weights.ista_norm, width, call.mean_2, call.rstd_2);
    if (norm) {
        norm.keep_statistics(frame, rows);
        row_statistics(middle, 0, rows, width, norm);
    }
    Finish difference;  // x - x Wᵀ
    difference.out = {frame.take(rows * padded), kFloat32, padded};
    difference.alpha = -1.0f;
    difference.residual = norm.of(middle);
    multiply_few_rows(norm.of(middle), weights.dictionary, false, rows, width, width, difference);
    multiply_few_rows(Source(difference.out), weights.dictionary, true, rows, width, width,
                      ista_finish(call, norm.of(middle)));
}

template <bool kPairs>
inline void forward(const LayerForward& call) {
    if (!kPairs && has_few_rows(call)) return forward_few_rows(call);
    const LayerShape& shape = call.shape;
    const AttentionShape& attention = shape.attention;
    const int64_t width = shape.width, inner = attention.heads * attention.width;
    const int64_t rows = attention.batch * attention.tokens;
    const LayerWeights& weights = call.weights;
    const bool mssa = call.halves & 1, ista = call.halves & 2;
    Frame frame;
    if (rows == 0) return;

    if (mssa) {
        Norm norm(frame, weights.mssa_norm, width, call.mean_1, call.rstd_1);
        norm.keep_statistics(frame, rows);
        const float* projection = static_cast<const float*>(weights.packed_projection);
        if (projection == nullptr) {
            float* packed = frame.take(packed_floats<kPairs>(width, inner));
            pack_matrix<kPairs>(weights.projection, true, 0, width, inner, packed);
            projection = packed;
        }
        Finish finish;
        finish.out = call.w;
        for_blocks_of_rows<kPairs>(rows, [&](int64_t first, int64_t count) {
            Frame block;
            row_statistics(call.z, first, count, width, norm);
            const PackedRows a =
                pack_rows<kPairs>(norm.of(call.z), first, count, 0, width, block.take(packed_rows_floats<kPairs>(count, width)));
            multiply_block<kPairs, false>(a, projection, Engine<kPairs>::units(width), first, count, inner, finish);
        });
        attend_tokens(call, frame);
    }

    const float* output = static_cast<const float*>(weights.packed_output);
    const float* output_bias = nullptr;
    const float step_1 = float(shape.mssa_step_size);
    if (mssa) {
        output_bias = vector(frame, weights.output_bias, width, step_1);
        if (output == nullptr && weights.output.data != nullptr) {
            float* packed = frame.take(packed_floats<kPairs>(inner, width));
            pack_matrix<kPairs>(weights.output, true, 0, inner, width, packed);
            output = packed;
        }
    }
    Norm norm;
    const float* folded = nullptr;      // z" = relu(x + eta x M - eta lambda), or
    const float* dictionary = nullptr;  // relu(x + eta (x - x Wᵀ) W - eta lambda) if there are few rows
    const float* dictionary_transposed = nullptr;
    if (ista) {
        norm = Norm(frame, weights.ista_norm, width, call.mean_2, call.rstd_2);
        if (norm) norm.keep_statistics(frame, rows);
        if (weights.packed_folded != nullptr || weights.folded.data != nullptr || 2 * rows >= width) {
            folded = packed_fold<kPairs>(frame, weights, width, false);
        } else {
            float* packed = frame.take(packed_floats<kPairs>(width, width));
            pack_matrix<kPairs>(weights.dictionary, false, 0, width, width, packed);
            dictionary = packed;
            packed = frame.take(packed_floats<kPairs>(width, width));
            pack_matrix<kPairs>(weights.dictionary, true, 0, width, width, packed);
            dictionary_transposed = packed;
        }
    }
    const int64_t padded = round_up(width, kColumns);
    for_blocks_of_rows<kPairs>(rows, [&](int64_t first, int64_t count) {
        Frame block;
        float* space = block.take(packed_rows_floats<kPairs>(count, width > inner ? width : inner));
        const auto multiply = [&](PackedRows a, const float* b, int64_t depth, const Finish& finish) {
            multiply_block<kPairs, false>(a, b, Engine<kPairs>::units(depth), first, count, width, finish);
        };
        Source middle = call.z;  // input of the ISTA half
        if (mssa) {
            // The tokens between the halves stay in this thread's cache as floats. The saved copy may have a narrower
            // type.
            MutableArray to = call.out;
            if (ista) {
                float* tokens = block.take(count * padded) - first * padded;
                to = {tokens, kFloat32, padded};
                middle = Source(tokens, padded);
            }
            if (output != nullptr) {
                Finish residual;  // z + step (o Woᵀ + b)
                residual.out = to;
                residual.alpha = step_1;
                residual.residual = call.z;
                residual.bias = output_bias;
                multiply(pack_rows<kPairs>(call.o, first, count, 0, inner, space), output, inner, residual);
            } else {
                add_attention(call, first, count, to);
            }
            if (ista && call.middle.data != nullptr)
                for (int64_t i = first; i < first + count; ++i)
                    write(call.middle.data, call.middle.type, i * call.middle.stride, width, float_row(middle, i, 0));
        }
        if (!ista) return;
        Finish step = ista_finish(call, norm.of(middle));
        if (norm) row_statistics(middle, first, count, width, norm);
        const PackedRows x = pack_rows<kPairs>(norm.of(middle), first, count, 0, width, space);
        if (!kPairs && folded != nullptr) step.residual = Source(x.data - first * x.stride, x.stride);  // just that
        if (folded != nullptr) {
            multiply(x, folded, width, step);
            return;
        }
        float* rest = block.take(count * padded);  // x - x Wᵀ
        Finish difference;
        difference.out = {rest - first * padded, kFloat32, padded};
        difference.alpha = -1.0f;
        difference.residual = norm.of(middle);
        multiply(x, dictionary_transposed, width, difference);
        multiply(pack_rows<kPairs>(Source(rest, padded), 0, count, 0, width, space), dictionary, width, step);
    });
}

inline void layer_forward(const LayerForward& call) {
    Frame frame;
    LayerForward own = call;
    const AttentionShape& attention = call.shape.attention;
    for (MutableArray* t : {&own.w, &own.o})  // scratch memory stays mapped: new memory costs a fault for every page
        if (call.halves & 1 && t->data == nullptr)
            t->data = frame.take<char>(attention.batch * attention.tokens * t->stride * bytes_of(t->type));
    with_engine(attention.low_precision, [&](auto kPairs) { forward<kPairs>(own); });
}

// -- backward ------------------------------------------------------------------------------------------------------

// Sums over rows (gradients of a norm and of a bias). Each tile has one partial row, and these are added in order. The
// result therefore does not depend on the number of threads.
struct ColumnSums {
    int64_t units, width;  // width: whole panels
    float* partial[3];     // (units, width)
    ColumnSums(Frame& frame, int64_t number, int64_t columns) : units(number), width(round_up(columns, kColumns)) {
        for (float*& p : partial) p = frame.take(units * width);
    }
    void finish(int index, int64_t columns, float factor, const MutableArray& out) const {
        if (out.data == nullptr) return;
        Frame frame;
        float* total = frame.take(width);
        parallel(width / kLanes, [&](int64_t begin, int64_t end) {
            for (int64_t k = begin * kLanes; k < end * kLanes; k += kLanes) {
                Floats s{};
                for (int64_t u = 0; u < units; ++u) s += load(partial[index] + u * width + k);
                store(total + k, s * factor);
            }
        });
        write(out.data, out.type, 0, columns, total);
    }
};

// Turns a gradient dy of LN(x) (rows x width, floats in whole panels) into that of x. Also sums the norm's own
// gradients.
inline void norm_backward_row(float* dy, const float* x, float mean, float rstd, const float* gamma, int64_t width,
                              float* dgamma, float* dbeta) {
    Floats sum_1{}, sum_2{};
    for (int64_t k = 0; k < width; k += kLanes) {
        const Floats centered = (load(x + k) - mean) * rstd, y = load(dy + k), a = y * load(gamma + k);
        sum_1 += a;
        sum_2 += a * centered;
        store(dgamma + k, load(dgamma + k) + y * centered);
        store(dbeta + k, load(dbeta + k) + y);
    }
    const float mean_1 = sum(sum_1) / float(width), mean_2 = sum(sum_2) / float(width);
    for (int64_t k = 0; k < width; k += kLanes) {
        const Floats centered = (load(x + k) - mean) * rstd, a = load(dy + k) * load(gamma + k);
        store(dy + k, (a - mean_1 - centered * mean_2) * rstd);
    }
}

// dx = LN-backward(product A B + residual) + more, row by row. The product is A (rows, depth) times packed B.
// Partial rows: 0 and 1 are the norm's gradients, 2 is the sum of dx.
template <bool kPairs>
inline void multiply_norm_backward(const Source& a, const float* b, int64_t rows, int64_t depth, int64_t width, float alpha,
                                   const Source& residual, const Source& x, const Norm& norm, const Source& more,
                                   const MutableArray& dx, const ColumnSums& sums) {
    constexpr int kTileRows = Engine<kPairs>::rows;
    for_blocks_of_rows<kPairs>(rows, [&](int64_t first, int64_t count) {
        Frame frame;
        const PackedRows packed =
            pack_rows<kPairs>(a, first, count, 0, depth, frame.take(packed_rows_floats<kPairs>(count, depth)));
        const int64_t padded = sums.width;
        float* gradient = frame.take(count * padded);
        float* row = frame.take(padded);
        Finish finish;
        finish.out = {gradient - first * padded, kFloat32, padded};
        finish.alpha = alpha;
        finish.residual = residual;
        if (!kPairs && residual.data != nullptr && residual.data == a.data)  // packed a moment ago, gate and all
            finish.residual = Source(packed.data - first * packed.stride, packed.stride);
        multiply_block<kPairs, false>(packed, b, Engine<kPairs>::units(depth), first, count, width, finish);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t unit = (first + i) / kTileRows;
            float* partial[3];
            for (int p = 0; p < 3; ++p) {
                partial[p] = sums.partial[p] + unit * padded;
                if ((first + i) % kTileRows == 0) std::memset(partial[p], 0, size_t(padded) * 4);
            }
            float* dy = gradient + i * padded;
            for (int64_t k = width; k < padded; ++k) dy[k] = 0;
            if (norm) {
                read(x.data, x.type, (first + i) * x.stride, width, row);
                norm_backward_row(dy, row, norm.mean[first + i], norm.rstd[first + i], norm.gamma, width, partial[0],
                                  partial[1]);
            }
            if (more.data != nullptr) {
                read(more.data, more.type, (first + i) * more.stride, width, row);
                for (int64_t k = 0; k < width; k += kLanes) store(dy + k, load(dy + k) + load(row + k));
            }
            for (int64_t k = 0; k < width; k += kLanes) store(partial[2] + k, load(partial[2] + k) + load(dy + k));
            write(dx.data, dx.type, (first + i) * dx.stride, width, dy);
        }
    });
}

inline void write_matrix(const MutableArray& out, const float* values, int64_t stride, int64_t rows, int64_t columns) {
    if (out.data == values) return;
    for (int64_t i = 0; i < rows; ++i) write(out.data, out.type, i * out.stride, columns, values + i * stride);
}

// A float matrix in which to compute `out`: `out` itself if its elements are floats.
inline float* float_matrix(Frame& frame, const MutableArray& out, int64_t rows, int64_t columns, int64_t* stride) {
    if (out.type == kFloat32) {
        *stride = out.stride;
        return static_cast<float*>(out.data);
    }
    *stride = round_up(columns, kLanes);
    return frame.take(rows * *stride);
}

template <bool kPairs>
inline void multiply_transposed_into(const Source& a, const Source& b, int64_t rows, int64_t depth, int64_t columns,
                                     float alpha, const MutableArray& out) {
    Frame frame;
    int64_t stride;
    float* values = float_matrix(frame, out, rows, columns, &stride);
    multiply_transposed<kPairs>(a, b, rows, depth, columns, alpha, values, stride);
    write_matrix(out, values, stride, rows, columns);
}

// dW = dM - W (dM + dMᵀ) with dM = eta xᵀ g.
template <bool kPairs>
inline void dictionary_gradient(const Source& x, const Source& g, const Source& w, int64_t rows, int64_t width, float eta,
                                const MutableArray& out) {
    Frame frame;
    const int64_t stride = round_up(width, kLanes);
    float* dm = frame.take(width * stride);
    float* symmetric = frame.take(width * stride);
    multiply_transposed<kPairs>(x, g, width, rows, width, eta, dm, stride);
    parallel((width + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kLanes; i < end * kLanes; i += kLanes)
            for (int64_t j = 0; j < width; j += kLanes) {
                Floats v[kLanes];
                for (int r = 0; r < kLanes; ++r)
                    v[r] = j + r < width ? load(dm + (j + r) * stride + i) : Floats{};
                transpose(v);
                for (int r = 0; r < kLanes && i + r < width; ++r)
                    store(symmetric + (i + r) * stride + j, load(dm + (i + r) * stride + j) + v[r]);
            }
    });
    float* packed = frame.take(packed_floats<kPairs>(width, width));
    pack_matrix<kPairs>(Source(symmetric, stride), false, 0, width, width, packed);
    Finish finish;
    finish.out = out;
    finish.alpha = -1.0f;
    finish.residual = Source(dm, stride);
    multiply<kPairs>(w, packed, width, width, width, finish);
}

// Gradients of the ISTA half for few rows, without the folded matrix, whose products would cost more than all others.
// With h = g Wᵀ: g Mᵀ = h - h W and dW = eta ((x - x Wᵀ)ᵀ g - hᵀ x).
template <bool kPairs>
inline void few_rows_backward(const LayerBackward& call, const Source& g, const Norm& norm, int64_t rows, int64_t width,
                              float eta, const MutableArray& dx, const ColumnSums& sums) {
    Frame frame;
    const Source x = norm.of(call.middle);
    const int64_t stride = round_up(width, kColumns);
    float* left = frame.take(2 * rows * stride);   // x - x Wᵀ, and -h below it
    float* right = frame.take(2 * rows * stride);  // g, and x below it
    float* negative_h = left + rows * stride;
    for (int64_t i = 0; i < rows; ++i) {
        fetch(g, i, 0, width, right + i * stride);
        fetch(x, i, 0, width, right + (rows + i) * stride);
    }
    float* packed = frame.take(packed_floats<kPairs>(width, width));
    pack_matrix<kPairs>(call.weights.dictionary, true, 0, width, width, packed);
    Finish finish;
    finish.alpha = -1.0f;
    finish.out = {negative_h, kFloat32, stride};
    multiply<kPairs>(Source(right, stride), packed, rows, width, width, finish);
    finish.out = {left, kFloat32, stride};
    finish.residual = Source(right + rows * stride, stride);
    multiply<kPairs>(finish.residual, packed, rows, width, width, finish);
    multiply_transposed_into<kPairs>(Source(left, stride), Source(right, stride), width, 2 * rows, width, eta,
                                     call.ddictionary);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < width; k += kLanes) {
            float* p = right + i * stride + k;
            store(p, load(p) - load(negative_h + i * stride + k) * eta);
        }
    pack_matrix<kPairs>(call.weights.dictionary, false, 0, width, width, packed);
    multiply_norm_backward<kPairs>(Source(negative_h, stride), packed, rows, width, width, eta, Source(right, stride),
                                   call.middle, norm, Source(), dx, sums);
}

template <bool kPairs>
inline void backward(const LayerBackward& call) {
    const LayerShape& shape = call.shape;
    const AttentionShape& attention = shape.attention;
    const LayerWeights& weights = call.weights;
    const int64_t width = shape.width, inner = attention.heads * attention.width;
    const int64_t rows = attention.batch * attention.tokens;
    const int64_t units = (rows + Engine<kPairs>::rows - 1) / Engine<kPairs>::rows;
    const bool mssa = call.halves & 1, ista = call.halves & 2;
    Frame frame;
    const ColumnSums sums(frame, units, width);

    Array dmiddle = call.grad;  // the gradient of the tokens between the halves
    if (ista) {
        const Norm norm(frame, weights.ista_norm, width, call.mean_2, call.rstd_2);
        const float eta = float(shape.step_size);
        const Source g = Source(call.grad).gated(call.out);
        MutableArray dx = call.dz;
        if (mssa) {
            const int64_t stride = round_up(width, kLanes);
            dx = {frame.take(rows * stride), kFloat32, stride};
            dmiddle = {dx.data, dx.type, dx.stride};
        }
        if (2 * rows < width) {
            few_rows_backward<kPairs>(call, g, norm, rows, width, eta, dx, sums);
        } else {
            Frame inside;
            const float* folded = packed_fold<kPairs>(inside, weights, width, true);
            multiply_norm_backward<kPairs>(g, folded, rows, width, width, eta, g, call.middle, norm, Source(), dx, sums);
            dictionary_gradient<kPairs>(norm.of(call.middle), g, weights.dictionary, rows, width, eta, call.ddictionary);
        }
        sums.finish(0, width, 1.0f, call.dista_norm_weight);
        sums.finish(1, width, 1.0f, call.dista_norm_bias);
        if (mssa) sums.finish(2, width, float(shape.mssa_step_size), call.doutput_bias);
    }
    if (!mssa) return;

    const Norm norm(frame, weights.mssa_norm, width, call.mean_1, call.rstd_1);
    const float step = float(shape.mssa_step_size);
    if (!ista && call.doutput_bias.data != nullptr) {
        parallel(units, [&](int64_t begin, int64_t end) {
            Frame inside;
            float* row = inside.take(sums.width);
            for (int64_t u = begin; u < end; ++u) {
                float* partial = sums.partial[2] + u * sums.width;
                std::memset(partial, 0, size_t(sums.width) * 4);
                const int64_t first = u * Engine<kPairs>::rows;
                for (int64_t i = first; i < first + Engine<kPairs>::rows && i < rows; ++i) {
                    read(dmiddle.data, dmiddle.type, i * dmiddle.stride, width, row);
                    for (int64_t k = 0; k < width; k += kLanes) store(partial + k, load(partial + k) + load(row + k));
                }
            }
        });
        sums.finish(2, width, step, call.doutput_bias);
    }
    const int64_t stride = round_up(inner, kLanes);
    float* grad_o = frame.take(rows * stride);
    Finish finish;
    finish.out = {grad_o, kFloat32, stride};
    finish.alpha = step;
    if (weights.output.data != nullptr) {
        Frame inside;
        float* packed = inside.take(packed_floats<kPairs>(width, inner));
        pack_matrix<kPairs>(weights.output, false, 0, width, inner, packed);
        multiply<kPairs>(dmiddle, packed, rows, width, inner, finish);
        multiply_transposed_into<kPairs>(dmiddle, call.o, width, rows, inner, step, call.doutput);
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            float* row = grad_o + i * stride;
            read(dmiddle.data, dmiddle.type, i * dmiddle.stride, width, row);
            for (int64_t k = 0; k < width; k += kLanes) store(row + k, load(row + k) * step);
        }
    }
    float* dw = frame.take(rows * stride);
    AttentionBackward attend_call{};
    attend_call.shape = attention;
    attend_call.w = heads_of(const_cast<void*>(call.w.data), call.w.type, attention);
    attend_call.out = heads_of(const_cast<void*>(call.o.data), call.o.type, attention);
    attend_call.lse = call.lse;
    const int64_t batch_stride = attention.tokens * stride;
    attend_call.grad = {grad_o, kFloat32, batch_stride, stride, attention.width};
    attend_call.dw = {dw, kFloat32, batch_stride, stride, attention.width};
    attention_backward(attend_call);

    multiply_transposed_into<kPairs>(Source(dw, stride), norm.of(call.z), inner, rows, width, 1.0f, call.dprojection);
    float* packed = frame.take(packed_floats<kPairs>(inner, width));
    pack_matrix<kPairs>(weights.projection, false, 0, inner, width, packed);
    multiply_norm_backward<kPairs>(Source(dw, stride), packed, rows, inner, width, 1.0f, Source(), call.z, norm, dmiddle,
                                   call.dz, sums);
    sums.finish(0, width, 1.0f, call.dmssa_norm_weight);
    sums.finish(1, width, 1.0f, call.dmssa_norm_bias);
}

inline void layer_backward(const LayerBackward& call) {
    with_engine(call.shape.attention.low_precision, [&](auto kPairs) { backward<kPairs>(call); });
}

}  // namespace crate::CRATE_ISA
