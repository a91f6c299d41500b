// o = softmax(s w wᵀ) w for one head of up to a few hundred tokens: one block per head, with the head in shared memory.
//
// The scores are symmetric. Every pair of row bands computes its tile of a = exp(s w wᵀ - K) once, and both bands use
// it (round_robin.cuh). K is one number for the head, the largest s‖w_i‖², which no score exceeds. There is no row
// maximum and no rescaling: o_i = Σ_j a_ij w_j / Σ_j a_ij. Row i contains the term a_ii = exp(s‖w_i‖² - K), which
// underflows only if the norms of the tokens differ widely. The block checks its norms first. It takes the ordinary
// online softmax (`online`) if they differ widely, if a value is not finite, or if s < 0.
//
// Per head, with T = ceil(N/16) row tiles, there are about T² + T(T+1)/2 tile products of depth p. An attention that
// does not use the symmetry needs 2T² products and twice the exponentials. Global traffic is w once, o once and four
// bytes per row; docs/cuda.md has the table.
//
// Each row is summed twice. o is divided by a sum from one more tensor-core product, with a column of ones. There the
// weights are rounded as in the numerator, so the rounding cancels if one weight is much larger than all others. lse is
// the sum of the fp32 weights, because the backward subtracts it from exact scores, and a weight near one must stay
// near one.
#pragma once

#include "crate/dispatch.h"
#include "crate/params.h"
#include "crate/round_robin.cuh"
#include "crate/warp_tile.cuh"

namespace crate {

// The range of powers of two below K in which a term stays accurate, and the position of K. bf16 has the range of fp32.
// fp16 has not, and uses its range above 1: a row's own term stays at 1 or more, so terms that underflow are below
// 2^-24 of it, as in any softmax in fp16.
template <class T>
struct ExponentRange;
template <>
struct ExponentRange<bf16> {
    static constexpr float kTop = 0.0f, kSpan = 100.0f;
};
template <>
struct ExponentRange<fp16> {
    static constexpr float kTop = 15.0f, kSpan = 15.0f;
};

template <class T, int kWidth, int kTokens>
struct AttentionForward {
    static_assert(kWidth % 16 == 0);
    static constexpr int kMostTokens = kTokens;
    // Two row tiles of a warp share every operand that they read from shared memory, as long as the registers hold
    // both.
    static constexpr int kRowTiles = kTokens > kSmallTokens || kWidth <= 64 ? 2 : 1;
    static constexpr int kBand = 16 * kRowTiles;  // rows of a warp
    static constexpr int kRowBytes = (kWidth + kChunkElements) * 2;
    static constexpr int kMaxThreads = (kTokens + kBand - 1) / kBand * kWarpSize;
    // Number of blocks that a multiprocessor should hold at once, so that one computes while another loads.
    static constexpr int kMinBlocks = kMaxThreads <= 224 ? 2 : 1;
    // Whether a warp keeps its own rows in registers as the left operand, or reads them again for every product.
    static constexpr bool kKeepOwn = kTokens > kSmallTokens ? kWidth <= 48 : kRowTiles == 1 ? kWidth <= 96 : kWidth <= 32;

    // If the output of a band does not fit the registers, the kernel passes over the head twice, for half the columns
    // each time.
    static constexpr int kPasses = kTokens > kSmallTokens && kWidth > 80 ? 2 : 1;
    static constexpr int kPassWidth = kWidth / kPasses;
    static constexpr int kStagingRowBytes = kPasses == 1 ? kRowBytes : (kPassWidth + kChunkElements) * 2;

    using Params = AttentionForwardParams;
    using Output = float[kRowTiles][kPassWidth / 16][2][4];
    // Row tile r is multiplied by ones in the columns of parity r, so that one accumulator holds the sums of both
    // tiles. Element 2 half + r belongs to row g + 8 half of tile r.
    using RoundedSums = float[4];
    using ExactSums = float[kRowTiles][2];  // this lane's part for rows g and g + 8

    CRATE_HOST_DEVICE static int warps(int tokens) { return (tokens + kBand - 1) / kBand; }
    CRATE_HOST_DEVICE static int rows_bytes(int warps) { return warps * kBand * kRowBytes; }
    // The data that warps exchange in one step: tiles, and the sums of their columns.
    CRATE_HOST_DEVICE static int tiles_bytes(int warps) { return warps * kRowTiles * kRowTiles * kTileBytes; }
    CRATE_HOST_DEVICE static int exchange_bytes(int warps) {
        return tiles_bytes(warps) + warps * kBand * int(sizeof(float));
    }
    CRATE_HOST_DEVICE static int scratch_bytes(int warps) { return (warps + 1) / 2 * 2 * int(sizeof(Float2)); }
    CRATE_HOST_DEVICE static int shared_bytes(int tokens) {
        const int n = warps(tokens), staging = kPasses == 1 ? 0 : n * kBand * kStagingRowBytes;
        return rows_bytes(n) + 2 * exchange_bytes(n) + scratch_bytes(n) + staging;
    }

    const Params& params;
    const RoundRobin meeting;
    const int band;  // first row of this warp
    const int length;  // number of visible keys
    const SharedAddress rows;
    uint32_t own[kRowTiles][kKeepOwn ? kWidth / 16 : 1][4];  // this warp's rows, as left operands
    int first_column;  // first column of this pass
    Output out;
    RoundedSums rounded;
    ExactSums exact;

    CRATE_DEVICE static void run(const Params& params) {
        const int batch = block_index() / params.heads;
        const int length = length_of(params.lengths, batch, params.tokens);
        const RoundRobin meeting{block_threads() / kWarpSize, warp_index()};
        AttentionForward{params, meeting, meeting.warp * kBand, length, shared_base()}.head();
    }

    CRATE_DEVICE SharedAddress row_address(int row) const { return rows + row * kRowBytes; }

    CRATE_DEVICE void head() {
        const int batch = block_index() / params.heads, head = block_index() % params.heads;
        const T* w = static_cast<const T*>(params.w) + batch * params.w_batch_stride + head * params.w_head_stride;
        copy_rows<kWidth>(rows, kRowBytes, w, params.w_token_stride, params.tokens, meeting.warps * kBand);
        wait_async<0>();
        if (length < params.tokens) clean_rows<kWidth, T>(rows, kRowBytes, length, params.tokens);
        sync_block();
        if constexpr (kKeepOwn)
            CRATE_UNROLL
            for (int r = 0; r < kRowTiles; ++r)
                CRATE_UNROLL
                for (int k = 0; k < kWidth / 16; ++k)
                    load_left(own[r][k], row_address(band + 16 * r) + 32 * k, kRowBytes);

        const float top = head_maximum();
        CRATE_NO_UNROLL
        for (first_column = 0; first_column < kWidth; first_column += kPassWidth) {
            float reference[kRowTiles][2];  // the number subtracted from each row's exponents, in powers of two
            clear();
            if (top < kInfinity) {
                CRATE_UNROLL
                for (int r = 0; r < kRowTiles; ++r) reference[r][0] = reference[r][1] = top;
                symmetric(top);
            } else {
                online(reference);
            }
            sync_block();  // the exchange can be reused, and after the last pass also the rows
            write(reference);
        }
    }

    CRATE_DEVICE void clear() {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            CRATE_UNROLL
            for (int e = 0; e < 4; ++e) {
                rounded[e] = exact[r][e / 2] = 0.0f;
                CRATE_UNROLL
                for (int n = 0; n < kPassWidth / 8; ++n) out[r][n / 2][n % 2][e] = 0.0f;
            }
        }
    }

    // The exponent K, in powers of two. It is infinite if the norms do not allow the symmetric path.
    CRATE_DEVICE float head_maximum() {
        const int lane = lane_index(), g = lane / 4, t = lane % 4;
        float low = kInfinity, high = -kInfinity;
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            float c[2][4] = {};
            CRATE_UNROLL
            for (int k = 0; k < kWidth / 16; ++k) {
                uint32_t b[4];
                load_right_of_transpose(b, row_address(band + 16 * r) + 32 * k, kRowBytes);
                multiply<T>(c, own_rows(r, k), b);
            }
            // The diagonal: rows g and g + 8, in the lanes with column g%8 of their half.
            const float diagonal[2] = {g % 2 ? c[0][1] : c[0][0], g % 2 ? c[1][3] : c[1][2]};
            CRATE_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (g / 2 != t || band + 16 * r + g + 8 * half >= params.tokens) continue;
                const float x = diagonal[half] * params.scale_log2;
                low = x < low ? x : (x < kInfinity ? low : -kInfinity);  // not finite: no symmetric path
                high = x > high ? x : high;
            }
        }
        CRATE_UNROLL
        for (int mask = 16; mask > 0; mask /= 2) {
            low = fminf(low, shuffle_xor(low, mask));
            high = fmaxf(high, shuffle_xor(high, mask));
        }
        if (lane == 0) store_shared(scratch() + meeting.warp * int(sizeof(Float2)), Float2{low, high});
        sync_block();
        for (int i = 0; i < meeting.warps; ++i) {
            const Float2 other = load_shared<Float2>(scratch() + i * int(sizeof(Float2)));
            low = fminf(low, other.x);
            high = fmaxf(high, other.y);
        }
        // With masked keys a row may lack its own term. Its scores then have only the lower bound -K.
        const float span = length < params.tokens ? 2 * high : high - low;
        // The rounding of larger scores could exceed the range of the exponents.
        const bool safe = params.scale_log2 >= 0 && span <= ExponentRange<T>::kSpan && high <= 0x1p22f;
        return safe ? high - ExponentRange<T>::kTop : kInfinity;
    }

    CRATE_DEVICE const uint32_t (&own_rows(int r, int k))[4] {
        if constexpr (kKeepOwn) return own[r][k];
        load_left(own[r][0], row_address(band + 16 * r) + 32 * k, kRowBytes);
        return own[r][0];
    }

    // Scores of this warp's rows and 16 keys.
    CRATE_DEVICE void score(float (&c)[kRowTiles][2][4], int key) {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r)
            CRATE_UNROLL
            for (int e = 0; e < 8; ++e) c[r][e / 4][e % 4] = 0.0f;
        CRATE_UNROLL
        for (int k = 0; k < kWidth / 16; ++k) {
            uint32_t b[4];
            load_right_of_transpose(b, row_address(key) + 32 * k, kRowBytes);
            CRATE_UNROLL
            for (int r = 0; r < kRowTiles; ++r) multiply<T>(c[r], own_rows(r, k), b);
        }
    }

    // out += a · w[key, key + 16), for the columns of this pass; rounded += a · 1
    CRATE_DEVICE void accumulate(const uint32_t (&a)[kRowTiles][4], int key) {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            const uint32_t ones = (lane_index() / 4 + r) % 2 ? 0 : pack<T>(1.0f, 1.0f);
            mma<T>(rounded, a[r], ones, ones);
        }
        CRATE_UNROLL
        for (int n = 0; n < kPassWidth / 16; ++n) {
            uint32_t b[4];
            load_right(b, row_address(key) + 2 * first_column + 32 * n, kRowBytes);
            CRATE_UNROLL
            for (int r = 0; r < kRowTiles; ++r) multiply<T>(out[r][n], a[r], b);
        }
    }

    // Whether the row may attend to the key in column `e` of a tile.
    CRATE_DEVICE bool visible(int row_tile, int key, int half, int e) const {
        const int lane = lane_index();
        const int column = key + 8 * half + 2 * (lane % 4) + e % 2;
        const int row = band + 16 * row_tile + lane / 4 + e / 2 * 8;
        return column < length && (!params.causal || column <= row);
    }
    CRATE_DEVICE bool all_visible(int key) const { return key + 16 <= length && (!params.causal || key + 15 <= band); }

    CRATE_DEVICE SharedAddress scratch() const {
        return rows + rows_bytes(meeting.warps) + 2 * exchange_bytes(meeting.warps);
    }
    CRATE_DEVICE SharedAddress exchange(int step) const {
        return rows + rows_bytes(meeting.warps) + step % 2 * exchange_bytes(meeting.warps);
    }
    CRATE_DEVICE SharedAddress slot(int step, int warp, int row_tile, int key_tile) const {
        return exchange(step) + ((warp * kRowTiles + row_tile) * kRowTiles + key_tile) * kTileBytes;
    }
    CRATE_DEVICE SharedAddress column_sum(int step, int warp, int column) const {
        return exchange(step) + tiles_bytes(meeting.warps) + (warp * kBand + column) * int(sizeof(float));
    }

    // The last band may be so short that its second row tile has no rows. That tile is skipped.
    CRATE_DEVICE bool has_rows(int row_tile) const { return row_tile == 0 || band + 16 * row_tile < params.tokens; }

    CRATE_DEVICE void symmetric(float top) {
        CRATE_NO_UNROLL
        for (int step = 0; meeting.meets(step); ++step) {
            const int partner = meeting.partner(step), giver = meeting.giver(step);
            if (meeting.computes(step, meeting.warp)) {
                // In causal attention the later band has the queries, whichever of the two warps computes the tile.
                const bool use = !params.causal || partner <= meeting.warp;
                const bool give = step > 0 && (!params.causal || partner > meeting.warp);
                CRATE_NO_UNROLL
                for (int tile = 0; tile < kRowTiles; ++tile)
                    if (const int key = partner * kBand + 16 * tile; key < params.tokens)
                        compute_pair(top, key, tile, step, use, give);
            }
            if (step == 0) continue;
            sync_block();
            if (meeting.computes(step, giver) && (!params.causal || giver < meeting.warp)) {
                CRATE_NO_UNROLL
                for (int tile = 0; tile < kRowTiles; ++tile) {
                    const int key = giver * kBand + 16 * tile;
                    if (key >= length) break;
                    uint32_t a[kRowTiles][4];
                    CRATE_UNROLL
                    for (int r = 0; r < kRowTiles; ++r)
                        if (has_rows(r))
                            take_transposed(a[r], slot(step, giver, tile, r));
                        else
                            a[r][0] = a[r][1] = a[r][2] = a[r][3] = 0;
                    accumulate(a, key);
                }
                CRATE_UNROLL
                for (int r = 0; r < kRowTiles; ++r)
                    if (lane_index() % 4 == 0 && has_rows(r))
                        CRATE_UNROLL
                        for (int half = 0; half < 2; ++half)
                            exact[r][half] += load_shared<float>(
                                column_sum(step, giver, 16 * r + 8 * half + lane_index() / 4));
            }
        }
    }

    CRATE_DEVICE void compute_pair(float top, int key, int tile, int step, bool use, bool give) {
        float c[kRowTiles][2][4];
        score(c, key);
        uint32_t a[kRowTiles][4];
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            CRATE_UNROLL
            for (int e = 0; e < 8; ++e)
                c[r][e / 4][e % 4] = exp2_approx(c[r][e / 4][e % 4] * params.scale_log2 - top);
            round_to_left<T>(a[r], c[r]);
        }
        if (give) {
            float columns[4] = {};
            // The rows of this warp are the keys of the other warp. Only the last bands have hidden rows.
            if (band + kBand <= length)
                give_tile<true>(c, a, step, tile, columns);
            else
                give_tile<false>(c, a, step, tile, columns);
            hand_over_columns(column_sum(step, meeting.warp, 16 * tile), columns);
        }
        if (!use || key >= length) return;
        if (!all_visible(key)) {
            CRATE_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                CRATE_UNROLL
                for (int e = 0; e < 8; ++e)
                    if (!visible(r, key, e / 4, e % 4)) c[r][e / 4][e % 4] = 0.0f;
                round_to_left<T>(a[r], c[r]);
            }
        }
        add_exact(c);
        accumulate(a, key);
    }

    template <bool kAllRows>
    CRATE_DEVICE void give_tile(const float (&c)[kRowTiles][2][4], const uint32_t (&a)[kRowTiles][4], int step, int tile,
                                float (&columns)[4]) {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            const int row = band + 16 * r + lane_index() / 4;
            const bool low = kAllRows || row < length, high = kAllRows || row + 8 < length;
            hand_over(slot(step, meeting.warp, r, tile),
                      {low ? a[r][0] : 0, high ? a[r][1] : 0, low ? a[r][2] : 0, high ? a[r][3] : 0});
            CRATE_UNROLL
            for (int i = 0; i < 4; ++i)
                columns[i] += (low ? c[r][i / 2][i % 2] : 0.0f) + (high ? c[r][i / 2][2 + i % 2] : 0.0f);
        }
    }

    CRATE_DEVICE void add_exact(const float (&c)[kRowTiles][2][4]) {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r)
            CRATE_UNROLL
            for (int e = 0; e < 8; ++e) exact[r][e % 4 / 2] += c[r][e / 4][e % 4];
    }

    // Sums columns[2 n + i], of column 8 n + 2 t + i, over the eight lanes with the same t. Each exchange halves the
    // number of sums per lane, so four shuffles are enough.
    CRATE_DEVICE static void hand_over_columns(SharedAddress to, const float (&columns)[4]) {
        const int lane = lane_index(), g = lane / 4, t = lane % 4, i = g % 2, n = g / 2 % 2;
        const float first = (i ? columns[1] : columns[0]) + shuffle_xor(i ? columns[0] : columns[1], 4);
        const float second = (i ? columns[3] : columns[2]) + shuffle_xor(i ? columns[2] : columns[3], 4);
        float sum = (n ? second : first) + shuffle_xor(n ? first : second, 8);
        sum += shuffle_xor(sum, 16);
        if (g < 4) store_shared(to + (8 * n + 2 * t + i) * int(sizeof(float)), sum);
    }

    // The ordinary softmax: every warp reads all keys of its rows and keeps a running maximum.
    CRATE_DEVICE void online(float (&maximum)[kRowTiles][2]) {
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) maximum[r][0] = maximum[r][1] = -kInfinity;
        CRATE_NO_UNROLL
        for (int key = 0; key < length && !(params.causal && key >= band + kBand); key += 16) {
            float c[kRowTiles][2][4];
            uint32_t a[kRowTiles][4];
            score(c, key);
            CRATE_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                float highest[2] = {maximum[r][0], maximum[r][1]};
                CRATE_UNROLL
                for (int e = 0; e < 8; ++e) {
                    float& x = c[r][e / 4][e % 4];
                    x = visible(r, key, e / 4, e % 4) ? x * params.scale_log2 : -kInfinity;
                    highest[e % 4 / 2] = fmaxf(highest[e % 4 / 2], x);
                }
                CRATE_UNROLL
                for (int half = 0; half < 2; ++half) {  // rows g and g + 8: elements 0, 1 and 2, 3
                    highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 1));
                    highest[half] = fmaxf(highest[half], shuffle_xor(highest[half], 2));
                    const float subtract = highest[half] == -kInfinity ? 0.0f : highest[half];
                    const float rescale = exp2_approx(maximum[r][half] - subtract);
                    maximum[r][half] = highest[half];
                    exact[r][half] *= rescale;
                    rounded[2 * half + r] *= rescale;
                    CRATE_UNROLL
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        CRATE_UNROLL
                        for (int n = 0; n < kPassWidth / 8; ++n) out[r][n / 2][n % 2][e] *= rescale;
                        CRATE_UNROLL
                        for (int n = 0; n < 2; ++n) c[r][n][e] = exp2_approx(c[r][n][e] - subtract);
                    }
                }
                round_to_left<T>(a[r], c[r]);
            }
            add_exact(c);
            accumulate(a, key);
        }
    }

    CRATE_DEVICE void write(const float (&reference)[kRowTiles][2]) const {
        const int batch = block_index() / params.heads, head = block_index() % params.heads, lane = lane_index();
        const int band = warp_index_again() * kBand;
        const int64_t token_stride = int64_t(params.heads) * kWidth;
        T* o = static_cast<T*>(params.o) + int64_t(batch) * params.tokens * token_stride + head * kWidth + first_column;
        float* lse = params.lse + int64_t(block_index()) * params.tokens;
        CRATE_UNROLL
        for (int r = 0; r < kRowTiles; ++r) {
            const int row = band + 16 * r;
            if (row >= params.tokens) break;
            // With one pass the rows are no longer needed and serve as staging memory. Otherwise the staging memory
            // follows all else.
            const SharedAddress staging =
                kPasses == 1 ? row_address(row) : scratch() + scratch_bytes(meeting.warps) + row * kStagingRowBytes;
            store_rows<T, kPassWidth>(o + row * token_stride, token_stride, params.tokens - row, out[r],
                                      reciprocal_approx(rounded[r]), reciprocal_approx(rounded[2 + r]), staging, kStagingRowBytes);
            if (first_column > 0) continue;
            CRATE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int i = row + lane / 4 + 8 * half;
                float sum = exact[r][half] + shuffle_xor(exact[r][half], 1);
                sum += shuffle_xor(sum, 2);
                if (lane % 4 == 0 && i < params.tokens)
                    store_global(lse + i, (reference[r][half] + log2_approx(sum)) * kLn2);
            }
        }
    }
};

}  // namespace crate
