// The parameters of the kernels. This header has no device code, so that launchers and the C interface can include it.
#pragma once

#include "crate/numeric.h"

namespace crate {

// LayerNorm: largest number of columns in a row. A thread has eight of them, and a block has at most 256 threads.
constexpr int kMaxColumns = 2048;

struct AttentionForwardParams {
    const void* w;           // (B, N, H, p), unit stride in p, rows aligned to 16 bytes
    void* o;                 // (B, N, H, p), contiguous
    float* lse;              // (B, H, N): natural logarithm of Σ_j exp(s w_i·w_j)
    const int32_t* lengths;  // (B,), or null: keys j >= lengths[b] are masked
    int64_t w_batch_stride, w_token_stride, w_head_stride;  // in elements
    int tokens, heads;
    float scale_log2;  // s log2(e)
    bool causal;
};

struct AttentionBackwardParams {
    const void* w;     // (B, N, H, p), unit stride in p, rows aligned to 16 bytes
    const void* grad;  // likewise
    const void* o;     // (B, N, H, p), contiguous
    const float* lse;  // (B, H, N)
    void* dw;          // (B, N, H, p), contiguous
    const int32_t* lengths;  // (B,), or null
    int64_t w_batch_stride, w_token_stride, w_head_stride;  // in elements
    int64_t grad_batch_stride, grad_token_stride, grad_head_stride;
    int tokens, heads;
    float scale, scale_log2;  // s, and s log2(e)
    bool causal;
};

// Rows of the stream (z, grad, out, the wide results) have the format of the products' operands, or are float32.
struct LayerNormForwardParams {
    const void* z;        // (rows, columns)
    const float* weight;  // (columns,)
    const float* bias;
    void* x;           // (rows, columns): LN(z), the operand of a product
    float* x_wide;     // LN(z) in float32, or null; only with a float32 stream
    float* mean;       // (rows,): results, or operands if they are known
    float* rstd;
    const void* grad;  // (rows, columns), or null; with `out`, also writes gated = grad where out > 0, else 0
    const void* out;
    void* gated;        // an operand of products, as x
    float* gated_wide;  // as x_wide
    int64_t rows;
    int columns;  // a multiple of 8
    bool known;   // mean and rstd are given
    float eps;
};

// All rows have the format of the stream.
struct LayerNormBackwardParams {
    const void* dx;  // (rows, columns): gradient of LN(z)
    const void* z;
    const float* mean;
    const float* rstd;
    const float* weight;   // (columns,)
    const void* residual;  // (rows, columns), or null: added to dz
    void* dz;
    float* partial;  // (blocks, sums, columns): dweight, dbias and, with a residual, its sum over the rows
    int64_t rows;
    int columns;
};

struct ReduceRowsParams {
    const float* in;  // (rows, sums, columns)
    float *first, *second, *third;  // the results (columns,), as many as there are sums
    int rows, sums, columns;
};

// A row-major matrix, or its transpose.
struct Matrix {
    const void* data;
    int64_t rows, columns, stride;  // stride in elements, between rows of the stored matrix
    bool transposed;                // rows and columns are those of the matrix in the product
    int format;                     // format of its elements, see numeric.h
};

struct ProductParams {
    Matrix a, b, out;
    const Matrix* c;   // null: nothing is added
    const void* bias;  // (columns of out,) in the format of out, or null
    float alpha, beta;
    bool relu;
    void* workspace;
    int64_t workspace_bytes;
    int device;
};

}  // namespace crate
