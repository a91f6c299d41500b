// The C interface of the CUDA library, which crate_kernels/ops/cuda_kernels loads with ctypes: no header of torch or of
// Python, so that one binary serves every version of both.
//
// Pointers are device pointers, strides count elements, a stream is a cudaStream_t. `format` is that of numeric.h. The
// current device must be the one that the pointers belong to. A function that returns an int enqueues work and returns
// 0, or refuses or fails and returns 1; crate_cuda_error() then says why. The caller answers for shapes and formats; the
// functions check what else would make a kernel read or write out of bounds.
#pragma once

#include <stdint.h>

#define CRATE_API extern "C" __attribute__((visibility("default")))

// Raised whenever a declaration below changes: a library of another number is not loaded.
CRATE_API int crate_cuda_interface(void);

// What went wrong in the last call of this thread that returned 1.
CRATE_API const char* crate_cuda_error(void);

// Why no kernel can run on this machine, and why the product cannot; null if they can.
CRATE_API const char* crate_cuda_missing(void);
CRATE_API const char* crate_cuda_product_missing(void);

// Bytes of shared memory of the larger of the two attention kernels; 0 where no kernel serves the head.
CRATE_API int crate_cuda_attention_shared_bytes(int width, int tokens);

// w (batch, tokens, heads, width) -> o, contiguous, and lse (batch, heads, tokens). lengths (batch,) may be null.
CRATE_API int crate_cuda_attention_forward(
    const void* w, void* o, float* lse, const int32_t* lengths, int64_t w_batch_stride, int64_t w_token_stride,
    int64_t w_head_stride, int batch, int tokens, int heads, int width, int format, double scale, int causal, void* stream);

// -> dw (batch, tokens, heads, width); o and dw are contiguous.
CRATE_API int crate_cuda_attention_backward(
    const void* grad, const void* w, const void* o, const float* lse, void* dw, const int32_t* lengths,
    int64_t grad_batch_stride, int64_t grad_token_stride, int64_t grad_head_stride, int64_t w_batch_stride,
    int64_t w_token_stride, int64_t w_head_stride, int batch, int tokens, int heads, int width, int format, double scale,
    int causal, void* stream);

// x = LN(z), contiguous (rows, columns), in `format`; mean and rstd (rows,) are results, or operands if `known`. With grad
// and out, which come together, also gated = grad where out > 0, else 0, in `format`. z, grad and out are in
// `stream_format`, which is `format` or float32; beside float32, x_wide and gated_wide, which may be null, take x and
// gated in float32 too.
CRATE_API int crate_cuda_layer_norm_forward(
    const void* z, const float* weight, const float* bias, void* x, float* x_wide, float* mean, float* rstd,
    const void* grad, const void* out, void* gated, float* gated_wide, int64_t rows, int columns, int format,
    int stream_format, int known, double eps, void* stream);

// -> dz, dweight and dbias (columns,) and, where a residual is given and added to dz, its sum over the rows (columns,).
// partial (blocks, 2 or 3, columns) is scratch. dx, z, residual and dz are in `stream_format`.
CRATE_API int crate_cuda_layer_norm_backward(
    const void* dx, const void* z, const float* mean, const float* rstd, const float* weight, const void* residual,
    void* dz, float* partial, float* dweight, float* dbias, float* residual_sum, int64_t rows, int columns, int blocks,
    int stream_format, void* stream);

// out (rows, columns) = alpha a b + c + bias, then ReLU if asked; a is (rows, depth). A stride is that of the rows as they
// are stored; a transposed matrix is stored the other way round. c has the format of out and may be null, as may bias
// (columns,). a and b share `format`.
CRATE_API int crate_cuda_product(
    const void* a, const void* b, const void* c, const void* bias, void* out, int64_t rows, int64_t columns, int64_t depth,
    int64_t a_stride, int a_transposed, int64_t b_stride, int b_transposed, int64_t c_stride, int64_t out_stride, int format,
    int out_format, double alpha, int relu, void* workspace, int64_t workspace_bytes, int device, void* stream);
