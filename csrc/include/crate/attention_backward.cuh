// The gradient of attention_forward.cuh: one block per head, one output.
//
//   P_ij = exp(s w_i·w_j - lse_i)      D_ij = g_i·w_j      delta_i = g_i·o_i
//   X_ij = s (P_ij (D_ij - delta_i) + P_ji (D_ji - delta_j))         symmetric
//   dw_i = Σ_j X_ij w_j + Σ_j P_ji g_j
//
// A pair of row tiles (i, j) is computed once (round_robin.cuh). It takes one product for the scores, two for D_ij and
// D_ji, and two for each side: seven products instead of the ten for separate dq, dk and dv. The computing warp keeps
// X_ij and P_ji as left operands for its own rows, and passes the transposes of X_ij and P_ij to the other warp. Sums
// stay in registers, in an order that the shape alone fixes. There are no atomics, so results are bitwise repeatable.
//
// Exponents are relative to each row's own lse, so no second path is needed. This takes a second exponential per pair,
// which the products hide. A large score differs from lse by rounding, so exponents are bounded by 0.
//
// Global traffic: w, g and o are read once, with four bytes per row, and dw is written once.
#pragma once

#include "crate/dispatch.h"
#include "crate/params.h"
#include "crate/round_robin.cuh"
#include "crate/warp_tile.cuh"

namespace crate {

struct alignas(16) TwoRows {
    Float2 row[2];
};

template <class T, int kWidth, int kTokens>
struct AttentionBackward {
    static_assert(kWidth % 16 == 0);
    static constexpr int kMostTokens = kTokens;
    static constexpr int kBand = 16;  // rows of a warp
    static constexpr int kRowBytes = (kWidth + kChunkElements) * 2;
    static constexpr int kMaxThreads = (kTokens + kBand - 1) / kBand * kWarpSize;
    static constexpr int kMinBlocks = 1;
    // Whether a warp keeps its own rows of w and g in registers, or reads them again for every pair.
    static constexpr bool kKeepOwn = kWidth <= (kTokens <= kSmallTokens ? 64 : 16);
    static constexpr int kOwn = kKeepOwn ? kWidth / 16 : 1;
    // Whether the products of a pair without masks are unrolled without predicates between them. For larger heads the
    // registers do not suffice for the loads that run ahead.
    static constexpr bool kAhead = kTokens <= kSmallTokens;
    // If the output of 16 rows does not fit the registers, the kernel passes over the head twice, for half the columns
    // each time.
    static constexpr int kPasses = kTokens > kSmallTokens && kWidth > 80 ? 2 : 1;
    static constexpr int kPassWidth = kWidth / kPasses;
    static constexpr int kStagingRowBytes = kPasses == 1 ? kRowBytes : (kPassWidth + kChunkElements) * 2;

    using Params = AttentionBackwardParams;

    CRATE_HOST_DEVICE static int warps(int tokens) { return (tokens + kBand - 1) / kBand; }
    CRATE_HOST_DEVICE static int rows_bytes(int warps) { return warps * kBand * kRowBytes; }
    CRATE_HOST_DEVICE static int exchange_bytes(int warps) { return warps * 2 * kTileBytes; }
    CRATE_HOST_DEVICE static int shared_bytes(int tokens) {
        const int n = warps(tokens), staging = kPasses == 1 ? 0 : n * kBand * kStagingRowBytes;
        return 2 * rows_bytes(n) + 2 * exchange_bytes(n) + n * kBand * int(sizeof(Float2)) + staging;
    }

    const Params& params;
    const RoundRobin meeting;
    const int band;    // first row of this warp
    const int length;  // number of visible keys
    const SharedAddress w_rows, grad_rows, exchange, scalars;  // scalars: for every row, lse in powers of two and delta
    uint32_t own_w[kOwn][4], own_grad[kOwn][4];
    int first_column;  // first column of this pass
    float out[kPassWidth / 16][2][4];

    CRATE_DEVICE static void run(const Params& params) {
        const int batch = block_index() / params.heads;
        const int length = length_of(params.lengths, batch, params.tokens);
        const RoundRobin meeting{block_threads() / kWarpSize, warp_index()};
        const SharedAddress w_rows = shared_base(), grad_rows = w_rows + rows_bytes(meeting.warps),
                            exchange = grad_rows + rows_bytes(meeting.warps),
                            scalars = exchange + 2 * exchange_bytes(meeting.warps);
        AttentionBackward{params, meeting, meeting.warp * kBand, length, w_rows, grad_rows, exchange, scalars}.head();
    }

    CRATE_DEVICE void head() {
        const int batch = block_index() / params.heads, head = block_index() % params.heads;
        const T* w = static_cast<const T*>(params.w) + batch * params.w_batch_stride + head * params.w_head_stride;
        const T* grad =
            static_cast<const T*>(params.grad) + batch * params.grad_batch_stride + head * params.grad_head_stride;
        const int padded = meeting.warps * kBand;
        copy_rows<kWidth>(w_rows, kRowBytes, w, params.w_token_stride, params.tokens, padded);
        copy_rows<kWidth>(grad_rows, kRowBytes, grad, params.grad_token_stride, params.tokens, padded);
        const Outputs outputs = load_outputs();  // these loads run at the same time as the copies
        wait_async<0>();
        if (length < params.tokens) clean_rows<kWidth, T>(w_rows, kRowBytes, length, params.tokens);
        sync_block();
        compute_scalars(outputs);
        sync_block();

        if constexpr (kKeepOwn) {
            CRATE_UNROLL
            for (int k = 0; k < kOwn; ++k) {
                load_left(own_w[k], address(w_rows, band, k), kRowBytes);
                load_left(own_grad[k], address(grad_rows, band, k), kRowBytes);
            }
        }
        CRATE_NO_UNROLL
        for (first_column = 0; first_column < kWidth; first_column += kPassWidth) {
            CRATE_UNROLL
            for (int i = 0; i < kPassWidth / 2; ++i) out[i / 8][i / 4 % 2][i % 4] = 0.0f;
            meet();
            sync_block();  // the exchange can be reused, and after the last pass also the rows
            write();
        }
    }

    CRATE_DEVICE void write() const {
        const int band = warp_index_again() * kBand;
        const int batch = block_index() / params.heads, head = block_index() % params.heads;
        const int64_t token_stride = int64_t(params.heads) * kWidth;
        T* dw = static_cast<T*>(params.dw) + (int64_t(batch) * params.tokens + band) * token_stride + head * kWidth;
        // With one pass the rows of w are no longer needed and serve as staging memory. Otherwise the staging memory
        // follows all else.
        const SharedAddress staging =
            kPasses == 1 ? address(w_rows, band, 0)
                         : scalars_of(meeting.warps * kBand) + band * kStagingRowBytes;
        store_rows<T, kPassWidth>(dw + first_column, token_stride, params.tokens - band, out, 1.0f, 1.0f, staging,
                                  kStagingRowBytes);
    }

    CRATE_DEVICE void meet() {
        CRATE_NO_UNROLL
        for (int step = 0; meeting.meets(step); ++step) {
            const int partner = meeting.partner(step), giver = meeting.giver(step);
            if (meeting.computes(step, meeting.warp)) compute_pair(step, partner);
            if (step == 0) continue;
            sync_block();
            if (meeting.computes(step, giver)) take(step, giver);
        }
    }

    CRATE_DEVICE static SharedAddress address(SharedAddress rows, int row, int k) {
        return rows + row * kRowBytes + 32 * k;
    }
    CRATE_DEVICE SharedAddress slot(int step, int warp, int which) const {
        return exchange + step % 2 * exchange_bytes(meeting.warps) + (2 * warp + which) * kTileBytes;
    }

    CRATE_DEVICE SharedAddress scalars_of(int row) const { return scalars + row * int(sizeof(Float2)); }

    // The values of o and lse that this lane needs. Four lanes share a row, and each lane has two rows, eight apart.
    struct Outputs {
        static constexpr int kChunks = kWidth / kChunkElements, kOfLane = (kChunks + 3) / 4;
        Chunk o[2][kOfLane];
        float lse[2];
    };

    CRATE_DEVICE Outputs load_outputs() const {
        const int batch = block_index() / params.heads, head = block_index() % params.heads;
        const int lane = lane_index(), t = lane % 4;
        Outputs loaded{};
        CRATE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = band + lane / 4 + 8 * half;
            if (row >= params.tokens) continue;
            const Chunk* o = static_cast<const Chunk*>(params.o) +
                             ((int64_t(batch) * params.tokens + row) * params.heads + head) * Outputs::kChunks;
            CRATE_UNROLL
            for (int i = 0; i < Outputs::kOfLane; ++i)
                if (4 * i + t < Outputs::kChunks) loaded.o[half][i] = load_global(o + 4 * i + t);
            if (t == 0) loaded.lse[half] = load_global(params.lse + int64_t(block_index()) * params.tokens + row);
        }
        return loaded;
    }

    // lse and delta of this warp's rows.
    CRATE_DEVICE void compute_scalars(const Outputs& loaded) const {
        const int lane = lane_index(), t = lane % 4;
        CRATE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = band + lane / 4 + 8 * half;
            float sum = 0.0f;
            CRATE_UNROLL
            for (int i = 0; i < Outputs::kOfLane; ++i) {
                if (4 * i + t >= Outputs::kChunks) continue;
                const Chunk grad = load_shared<Chunk>(grad_rows + row * kRowBytes + (4 * i + t) * 16);
                CRATE_UNROLL
                for (int k = 0; k < 4; ++k) {
                    float a0, a1, b0, b1;
                    unpack<T>(loaded.o[half][i].word[k], a0, a1);
                    unpack<T>(grad.word[k], b0, b1);
                    sum += a0 * b0 + a1 * b1;
                }
            }
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (t == 0) store_shared(scalars_of(row), Float2{loaded.lse[half] * kLog2E, sum});
        }
    }

    // Whether a query of one tile may see a key of the other. This decides which products a pair needs; both warps
    // compute it.
    CRATE_DEVICE bool sees(int query_tile, int key_tile) const {
        return key_tile * kBand < length && (!params.causal || key_tile <= query_tile);
    }

    using Tile = float[2][4];

    // s += w_i·w_j, d += g_i·w_j, d_other += w_i·g_j. For a pair without masks there are no predicates between the
    // products, so its loads run ahead of them.
    template <bool kInFull>
    CRATE_DEVICE void multiply_pair(Tile& s, Tile& d, Tile& d_other, int partner, bool forward, bool backward) {
        CRATE_UNROLL
        for (int k = 0; k < kWidth / 16; ++k) {
            uint32_t b[4];
            uint32_t(&a_w)[4] = own_w[kKeepOwn ? k : 0];
            uint32_t(&a_grad)[4] = own_grad[kKeepOwn ? k : 0];
            if constexpr (!kKeepOwn) {
                load_left(a_w, address(w_rows, band, k), kRowBytes);
                load_left(a_grad, address(grad_rows, band, k), kRowBytes);
            }
            load_right_of_transpose(b, address(w_rows, partner * kBand, k), kRowBytes);
            multiply<T>(s, a_w, b);
            if (kInFull || forward) multiply<T>(d, a_grad, b);
            if (kInFull || backward) {
                load_right_of_transpose(b, address(grad_rows, partner * kBand, k), kRowBytes);
                multiply<T>(d_other, a_w, b);
            }
        }
    }

    CRATE_DEVICE void compute_pair(int step, int partner) {
        const bool forward = sees(meeting.warp, partner), backward = sees(partner, meeting.warp);
        if (!forward && !backward) return;
        Tile s = {}, d = {}, d_other = {};
        if (kAhead && forward && backward)
            multiply_pair<true>(s, d, d_other, partner, true, true);
        else
            multiply_pair<false>(s, d, d_other, partner, forward, backward);

        const int lane = lane_index(), t = lane % 4;
        const Float2 row_scalars[2] = {load_shared<Float2>(scalars_of(band + lane / 4)),
                                       load_shared<Float2>(scalars_of(band + lane / 4 + 8))};
        const bool masked = params.causal || band + kBand > length || (partner + 1) * kBand > length;
        CRATE_UNROLL
        for (int n = 0; n < 2; ++n) {
            const int first = partner * kBand + 8 * n + 2 * t;  // this lane has the columns `first` and `first + 1`
            const TwoRows columns = load_shared<TwoRows>(scalars_of(first));
            float p[4], p_other[4];
            CRATE_UNROLL
            for (int e = 0; e < 4; ++e) {
                const Float2 own = row_scalars[e / 2], other = columns.row[e % 2];
                const float score = s[n][e] * params.scale_log2;
                p[e] = exp2_approx(at_most_zero(score - own.x));
                p_other[e] = exp2_approx(at_most_zero(score - other.x));
                d[n][e] -= own.y;
                d_other[n][e] -= other.y;
            }
            if (masked) {
                CRATE_UNROLL
                for (int e = 0; e < 4; ++e) {
                    const int column = first + e % 2, row = band + lane / 4 + e / 2 * 8;
                    // A hidden token may be so large that the differences are infinite. These are removed, too.
                    if (column >= length || (params.causal && column > row)) p[e] = d[n][e] = 0.0f;
                    if (row >= length || (params.causal && row > column)) p_other[e] = d_other[n][e] = 0.0f;
                }
            }
            CRATE_UNROLL
            for (int e = 0; e < 4; ++e) {
                s[n][e] = params.scale * (p[e] * d[n][e] + p_other[e] * d_other[n][e]);
                d[n][e] = p[e];
                d_other[n][e] = p_other[e];
            }
        }
        uint32_t x[4], p[4];
        round_to_left<T>(x, s);
        if (step > 0) {
            hand_over(slot(step, meeting.warp, 0), x);
            if (forward) {
                round_to_left<T>(p, d);
                hand_over(slot(step, meeting.warp, 1), p);
            }
        }
        accumulate(x, w_rows, partner);
        if (backward) {
            round_to_left<T>(p, d_other);
            accumulate(p, grad_rows, partner);
        }
    }

    CRATE_DEVICE void take(int step, int giver) {
        const bool forward = sees(giver, meeting.warp), backward = sees(meeting.warp, giver);
        if (!forward && !backward) return;
        uint32_t a[4];
        take_transposed(a, slot(step, giver, 0));
        accumulate(a, w_rows, giver);
        if (forward) {
            take_transposed(a, slot(step, giver, 1));
            accumulate(a, grad_rows, giver);
        }
    }

    // out += a · rows of the tile, for the columns of this pass
    CRATE_DEVICE void accumulate(const uint32_t (&a)[4], SharedAddress rows, int tile) {
        CRATE_UNROLL
        for (int n = 0; n < kPassWidth / 16; ++n) {
            uint32_t b[4];
            load_right(b, address(rows, tile * kBand, n) + 2 * first_column, kRowBytes);
            multiply<T>(out[n], a, b);
        }
    }
};

}  // namespace crate
