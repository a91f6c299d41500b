// LayerNorm around the products of a block: forward with statistics, backward with the other operations on the same
// rows.
//
// One thread has eight columns (one 16-byte chunk) of every row of its block, so column sums need no exchange between
// threads. Each block keeps them in registers and writes one partial sum. ReduceRows adds the partial sums in a fixed
// order. A block takes four rows at a time, which share each reduction over the columns.
#pragma once

#include "crate/params.h"
#include "crate/primitives.h"

namespace crate {

constexpr int kRowsAtOnce = 4;

struct alignas(16) RowSums {
    float row[kRowsAtOnce];
};

CRATE_HOST_DEVICE int layer_norm_threads(int columns) {
    return (columns / kChunkElements + kWarpSize - 1) / kWarpSize * kWarpSize;
}
CRATE_HOST_DEVICE int layer_norm_shared_bytes(int columns) {
    return layer_norm_threads(columns) / kWarpSize * int(sizeof(RowSums));
}

// The sums of four values over the block, in every thread. Each exchange between lanes halves the number of sums per
// lane, so six shuffles are enough for the four.
CRATE_DEVICE RowSums sum_over_block(const RowSums& v) {
    const int lane = lane_index(), i = lane % 2, j = lane / 2 % 2, warps = block_threads() / kWarpSize;
    const float first = (i ? v.row[1] : v.row[0]) + shuffle_xor(i ? v.row[0] : v.row[1], 1);
    const float second = (i ? v.row[3] : v.row[2]) + shuffle_xor(i ? v.row[2] : v.row[3], 1);
    float sum = (j ? second : first) + shuffle_xor(j ? first : second, 2);
    for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
    sync_block();  // all threads have read the results of the previous call
    const SharedAddress scratch = shared_base();
    if (lane < kRowsAtOnce) store_shared(scratch + (warp_index() * kRowsAtOnce + lane) * int(sizeof(float)), sum);
    sync_block();
    RowSums total{};
    for (int warp = 0; warp < warps; ++warp) {
        const RowSums other = load_shared<RowSums>(scratch + warp * int(sizeof(RowSums)));
        CRATE_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) total.row[r] += other.row[r];
    }
    return total;
}

template <class T>
CRATE_DEVICE void unpack_chunk(float (&v)[kChunkElements], const Chunk& chunk) {
    CRATE_UNROLL
    for (int i = 0; i < 4; ++i) unpack<T>(chunk.word[i], v[2 * i], v[2 * i + 1]);
}
template <class T>
CRATE_DEVICE Chunk pack_chunk(const float (&v)[kChunkElements]) {
    return {{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])}};
}

// Eight elements of a row, stored as T: bf16, fp16 or float.
template <class T>
CRATE_DEVICE void load_elements(float (&v)[kChunkElements], const void* matrix, int64_t row, int columns, int chunk) {
    const int64_t first = row * columns + chunk * kChunkElements;
    if constexpr (std::is_same_v<T, float>) {
        CRATE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const RowSums part = load_global(reinterpret_cast<const RowSums*>(static_cast<const float*>(matrix) + first) + half);
            CRATE_UNROLL
            for (int i = 0; i < 4; ++i) v[4 * half + i] = part.row[i];
        }
    } else {
        unpack_chunk<T>(v, load_global(reinterpret_cast<const Chunk*>(static_cast<const T*>(matrix) + first)));
    }
}
template <class T>
CRATE_DEVICE void store_elements(void* matrix, int64_t row, int columns, int chunk, const float (&v)[kChunkElements]) {
    const int64_t first = row * columns + chunk * kChunkElements;
    if constexpr (std::is_same_v<T, float>) {
        CRATE_UNROLL
        for (int half = 0; half < 2; ++half)
            store_global(reinterpret_cast<RowSums*>(static_cast<float*>(matrix) + first) + half,
                         RowSums{{v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]}});
    } else {
        store_global(reinterpret_cast<Chunk*>(static_cast<T*>(matrix) + first), pack_chunk<T>(v));
    }
}

// T is the format of the products' operands, S that of the stream: T or float.
template <class T, class S>
struct LayerNormForward {
    using Params = LayerNormForwardParams;

    CRATE_DEVICE static void run(const Params& params, int blocks) {
        const int columns = params.columns, chunk = thread_index();
        const bool active = chunk < columns / kChunkElements;
        float weight[kChunkElements] = {}, bias[kChunkElements] = {};
        if (active) {
            load_elements<float>(weight, params.weight, 0, columns, chunk);
            load_elements<float>(bias, params.bias, 0, columns, chunk);
        }
        for (int64_t first = int64_t(block_index()) * kRowsAtOnce; first < params.rows;
             first += int64_t(blocks) * kRowsAtOnce) {
            float z[kRowsAtOnce][kChunkElements] = {};
            CRATE_UNROLL
            for (int r = 0; r < kRowsAtOnce; ++r)
                if (active && first + r < params.rows) load_elements<S>(z[r], params.z, first + r, columns, chunk);
            RowSums mean{}, rstd{};
            if (params.known) {
                CRATE_UNROLL
                for (int r = 0; r < kRowsAtOnce; ++r) {
                    if (!active || first + r >= params.rows) continue;
                    mean.row[r] = load_global(params.mean + first + r);
                    rstd.row[r] = load_global(params.rstd + first + r);
                    CRATE_UNROLL
                    for (int i = 0; i < kChunkElements; ++i) z[r][i] -= mean.row[r];
                }
            } else {
                center(z, mean, rstd, columns, active, params.eps);
            }
            CRATE_UNROLL
            for (int r = 0; r < kRowsAtOnce; ++r) {
                if (!active || first + r >= params.rows) continue;
                CRATE_UNROLL
                for (int i = 0; i < kChunkElements; ++i) z[r][i] = z[r][i] * rstd.row[r] * weight[i] + bias[i];
                store_elements<T>(params.x, first + r, columns, chunk, z[r]);
                if constexpr (std::is_same_v<S, float>)
                    if (params.x_wide) store_elements<float>(params.x_wide, first + r, columns, chunk, z[r]);
                if (!params.known && chunk == 0) {
                    store_global(params.mean + first + r, mean.row[r]);
                    store_global(params.rstd + first + r, rstd.row[r]);
                }
                if (params.grad) gate(params, first + r, chunk);
            }
        }
    }

    // Subtracts the mean from each row, and returns it together with 1/σ.
    CRATE_DEVICE static void center(float (&z)[kRowsAtOnce][kChunkElements], RowSums& mean, RowSums& rstd, int columns,
                                    bool active, float eps) {
        const float share = 1.0f / columns;  // a division takes at least ten instructions
        RowSums sums{}, squares{};
        CRATE_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r)
            CRATE_UNROLL
            for (int i = 0; i < kChunkElements; ++i) sums.row[r] += z[r][i];
        mean = sum_over_block(sums);
        CRATE_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) {
            mean.row[r] *= share;
            CRATE_UNROLL
            for (int i = 0; active && i < kChunkElements; ++i) {
                z[r][i] -= mean.row[r];
                squares.row[r] += z[r][i] * z[r][i];
            }
        }
        rstd = sum_over_block(squares);
        CRATE_UNROLL
        for (int r = 0; r < kRowsAtOnce; ++r) rstd.row[r] = rsqrt_approx(rstd.row[r] * share + eps);
    }

    CRATE_DEVICE static void gate(const Params& params, int64_t row, int chunk) {
        float grad[kChunkElements], out[kChunkElements];
        load_elements<S>(grad, params.grad, row, params.columns, chunk);
        load_elements<S>(out, params.out, row, params.columns, chunk);
        CRATE_UNROLL
        for (int i = 0; i < kChunkElements; ++i) grad[i] = out[i] <= 0 ? 0.0f : grad[i];  // NaN lets the gradient pass
        store_elements<T>(params.gated, row, params.columns, chunk, grad);
        if constexpr (std::is_same_v<S, float>)
            if (params.gated_wide) store_elements<float>(params.gated_wide, row, params.columns, chunk, grad);
    }
};

template <class S>
struct LayerNormBackward {
    using Params = LayerNormBackwardParams;

    CRATE_HOST_DEVICE static int sums(const Params& params) { return params.residual ? 3 : 2; }

    CRATE_DEVICE static void run(const Params& params, int blocks) {
        const int columns = params.columns, chunk = thread_index();
        const bool active = chunk < columns / kChunkElements;
        const float share = 1.0f / columns;
        float weight[kChunkElements] = {}, partial[3][kChunkElements] = {};
        if (active) load_elements<float>(weight, params.weight, 0, columns, chunk);
        for (int64_t first = int64_t(block_index()) * kRowsAtOnce; first < params.rows;
             first += int64_t(blocks) * kRowsAtOnce) {
            float dx[kRowsAtOnce][kChunkElements] = {}, normal[kRowsAtOnce][kChunkElements] = {};
            RowSums rstd{}, sums{}, products{};  // Σ γ dx, Σ γ dx x̂
            CRATE_UNROLL
            for (int r = 0; r < kRowsAtOnce; ++r) {
                if (!active || first + r >= params.rows) continue;
                const float mean = load_global(params.mean + first + r);
                rstd.row[r] = load_global(params.rstd + first + r);
                load_elements<S>(dx[r], params.dx, first + r, columns, chunk);
                load_elements<S>(normal[r], params.z, first + r, columns, chunk);
                CRATE_UNROLL
                for (int i = 0; i < kChunkElements; ++i) {
                    normal[r][i] = (normal[r][i] - mean) * rstd.row[r];
                    partial[0][i] += dx[r][i] * normal[r][i];
                    partial[1][i] += dx[r][i];
                    dx[r][i] *= weight[i];
                    sums.row[r] += dx[r][i];
                    products.row[r] += dx[r][i] * normal[r][i];
                }
            }
            sums = sum_over_block(sums);
            products = sum_over_block(products);
            CRATE_UNROLL
            for (int r = 0; r < kRowsAtOnce; ++r) {
                if (!active || first + r >= params.rows) continue;
                float dz[kChunkElements] = {};
                if (params.residual) {
                    load_elements<S>(dz, params.residual, first + r, columns, chunk);
                    CRATE_UNROLL
                    for (int i = 0; i < kChunkElements; ++i) partial[2][i] += dz[i];
                }
                CRATE_UNROLL
                for (int i = 0; i < kChunkElements; ++i)
                    dz[i] += rstd.row[r] * (dx[r][i] - (sums.row[r] + normal[r][i] * products.row[r]) * share);
                store_elements<S>(params.dz, first + r, columns, chunk, dz);
            }
        }
        if (!active) return;
        for (int s = 0; s < LayerNormBackward::sums(params); ++s) {
            float* row = params.partial + (int64_t(block_index()) * LayerNormBackward::sums(params) + s) * columns;
            CRATE_UNROLL
            for (int half = 0; half < 2; ++half) {
                RowSums part;
                CRATE_UNROLL
                for (int i = 0; i < 4; ++i)
                    part.row[i] = s == 0 ? partial[0][4 * half + i]
                                         : s == 1 ? partial[1][4 * half + i] : partial[2][4 * half + i];
                store_global(reinterpret_cast<RowSums*>(row) + 2 * chunk + half, part);
            }
        }
    }
};

// Sums over the rows in an order that depends only on their number. A block has 32 columns of all sums side by side,
// and its warps take the rows in turn.
struct ReduceRows {
    using Params = ReduceRowsParams;
    static constexpr int kThreads = 512;
    static constexpr int kSharedBytes = kThreads * int(sizeof(float));

    CRATE_HOST_DEVICE static int blocks(const Params& params) {
        return (params.sums * params.columns + kWarpSize - 1) / kWarpSize;
    }

    CRATE_DEVICE static void run(const Params& params) {
        constexpr int kWarps = kThreads / kWarpSize;
        const int all = params.sums * params.columns;
        const int column = block_index() * kWarpSize + lane_index();
        float sum = 0.0f;
        if (column < all)
            for (int row = warp_index(); row < params.rows; row += kWarps)
                sum += load_global(params.in + int64_t(row) * all + column);
        const SharedAddress scratch = shared_base();
        store_shared(scratch + thread_index() * int(sizeof(float)), sum);
        sync_block();
        if (warp_index() > 0 || column >= all) return;
        sum = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp)
            sum += load_shared<float>(scratch + (warp * kWarpSize + lane_index()) * int(sizeof(float)));
        const int which = column / params.columns;
        float* const out = which == 0 ? params.first : which == 1 ? params.second : params.third;
        store_global(out + column % params.columns, sum);
    }
};

}  // namespace crate
