// What one warp does with 16x16 tiles. A tile of 16-bit numbers in shared memory is addressed by the byte address of
// its first element and the byte stride of its rows; strides that are odd multiples of 16 bytes keep ldmatrix, and the
// fragment-wise stores below, free of bank conflicts.
//
// g = lane/4 and t = lane%4 throughout: a lane's four accumulators c[e] of a 16x8 tile are row g + 8(e/2), column
// 2t + e%2.
#pragma once

#include "crate/primitives.h"

namespace crate {

// Rows and columns of the tile as they lie: the left operand (A), or with transposition the right operand of a product
// that runs over the rows (B[k][n] = tile[k][n]); fragment[0..1] then is columns 0-7, fragment[2..3] columns 8-15.
CRATE_DEVICE void load_left(uint32_t (&fragment)[4], SharedAddress tile, int row_bytes) {
    const int lane = lane_index();
    load_matrix_x4(fragment, tile + lane % 16 * row_bytes + lane / 16 * 16);
}
CRATE_DEVICE void load_right(uint32_t (&fragment)[4], SharedAddress tile, int row_bytes) {
    const int lane = lane_index();
    load_matrix_x4_transposed(fragment, tile + lane % 16 * row_bytes + lane / 16 * 16);
}
// The right operand of a product with the transposed tile (B[k][n] = tile[n][k]).
CRATE_DEVICE void load_right_of_transpose(uint32_t (&fragment)[4], SharedAddress tile, int row_bytes) {
    const int lane = lane_index();
    load_matrix_x4(fragment, tile + (lane % 8 + lane / 16 * 8) * row_bytes + lane / 8 % 2 * 16);
}

// c (16x16, as two 16x8 halves) += a b
template <class T>
CRATE_DEVICE void multiply(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    mma<T>(c[0], a, b[0], b[1]);
    mma<T>(c[1], a, b[2], b[3]);
}

// A tile of accumulators, rounded, is a left operand of the next product as it stands.
template <class T>
CRATE_DEVICE void round_to_left(uint32_t (&a)[4], const float (&c)[2][4]) {
    a[0] = pack<T>(c[0][0], c[0][1]);
    a[1] = pack<T>(c[0][2], c[0][3]);
    a[2] = pack<T>(c[1][0], c[1][1]);
    a[3] = pack<T>(c[1][2], c[1][3]);
}

// Handing a left operand to another warp, transposed: 512 bytes, four 8x8 matrices of 128 contiguous bytes each.
constexpr int kTileBytes = 512;

CRATE_DEVICE void hand_over(SharedAddress slot, const uint32_t (&a)[4]) {
    CRATE_UNROLL
    for (int r = 0; r < 4; ++r) store_shared(slot + r * 128 + lane_index() * 4, a[r]);
}
CRATE_DEVICE void take_transposed(uint32_t (&a)[4], SharedAddress slot) {
    const int lane = lane_index(), matrix = lane / 8;
    // Transposition swaps the off-diagonal matrices, 1 and 2, and transposes each.
    load_matrix_x4_transposed(a, slot + (matrix % 2 * 2 + matrix / 2) * 128 + lane % 8 * 16);
}

// How many keys a batch entry has; never more than there are tokens, whatever was asked for.
CRATE_DEVICE int length_of(const int32_t* lengths, int batch, int tokens) {
    const int length = lengths ? load_global(lengths + batch) : tokens;
    return length < tokens ? length : tokens;
}

// Copies the rows [0, rows) of a matrix in global memory to shared memory and sets the rows [rows, padded) to zero.
// The whole block takes part; the copies are one cp.async group, left for the caller to wait for.
template <int kColumns, class T>
CRATE_DEVICE void copy_rows(SharedAddress to, int row_bytes, const T* from, int64_t row_stride, int rows, int padded) {
    constexpr int kChunks = kColumns / kChunkElements;
    for (int i = thread_index(); i < padded * kChunks; i += block_threads()) {
        const int row = i / kChunks, chunk = i % kChunks;
        const SharedAddress address = to + row * row_bytes + chunk * 16;
        if (row < rows)
            copy_async(address, from + row * row_stride + chunk * kChunkElements);
        else
            store_shared(address, Chunk{});
    }
    commit_async();
}

// What is not finite in the rows [first, rows) becomes zero. Rows behind `lengths` may hold anything, and a weight of zero
// does not make zero of it. Each thread looks at what it has copied by copy_rows and waited for, so it needs no barrier.
template <int kColumns, class T>
CRATE_DEVICE void clean_rows(SharedAddress to, int row_bytes, int first, int rows) {
    constexpr int kChunks = kColumns / kChunkElements;
    constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
    for (int i = thread_index(); i < rows * kChunks; i += block_threads()) {
        if (i < first * kChunks) continue;
        const SharedAddress address = to + i / kChunks * row_bytes + i % kChunks * 16;
        Chunk chunk = load_shared<Chunk>(address);
        CRATE_UNROLL
        for (uint32_t& word : chunk.word) {
            if ((word & kExponent) == kExponent) word &= 0xffff0000u;
            if ((word >> 16 & kExponent) == kExponent) word &= 0x0000ffffu;
        }
        store_shared(address, chunk);
    }
}

// Writes 16 rows of accumulators, each times its factor, to global memory in whole 16-byte chunks, through rows of
// shared memory that are this warp's alone by now.
template <class T, int kColumns>
CRATE_DEVICE void store_rows(T* to, int64_t row_stride, int rows, const float (&c)[kColumns / 16][2][4],
                             float factor_low, float factor_high, SharedAddress staging, int row_bytes) {
    constexpr int kChunks = kColumns / kChunkElements;
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    CRATE_UNROLL
    for (int n = 0; n < kChunks; ++n) {
        const float(&v)[4] = c[n / 2][n % 2];
        const SharedAddress address = staging + g * row_bytes + n * 16 + t * 4;
        store_shared(address, pack<T>(v[0] * factor_low, v[1] * factor_low));
        store_shared(address + 8 * row_bytes, pack<T>(v[2] * factor_high, v[3] * factor_high));
    }
    sync_warp();
    for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
        const int row = i / kChunks, chunk = i % kChunks;
        if (row < rows)
            store_global(reinterpret_cast<Chunk*>(to + row * row_stride + chunk * kChunkElements),
                         load_shared<Chunk>(staging + row * row_bytes + chunk * 16));
    }
}

}  // namespace crate
