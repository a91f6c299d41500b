// The C interface of the CUDA library, which crate_kernels/ops/cuda_kernels loads with ctypes. It uses no header of
// torch or of Python, so one binary serves every version of both.
//
// Pointers are device pointers, strides count elements, a stream is a cudaStream_t. `format` is one of numeric.h. The
// pointers must belong to the current device. A function that returns an int enqueues work and returns 0, or returns 1
// after an error; crate_cuda_error() then gives the reason. The caller is responsible for shapes and formats. The
// functions check everything else that could make a kernel read or write out of bounds.
#pragma once

#include <stdint.h>

#define CRATE_API extern "C" __attribute__((visibility("default")))

// Increased whenever a declaration below changes. A library with another number is not loaded.
CRATE_API int crate_cuda_interface(void);

// The error of the last call of this thread that returned 1.
CRATE_API const char* crate_cuda_error(void);

// The reason why no kernel can run on this machine, and the reason why the product cannot run; null if they can.
CRATE_API const char* crate_cuda_missing(void);
CRATE_API const char* crate_cuda_product_missing(void);

// Bytes of shared memory of a block of the attention forward or backward; 0 if there is no kernel for the head.
CRATE_API int crate_cuda_attention_shared_bytes(int backward, int width, int tokens);

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

// x = LN(z), contiguous (rows, columns), in `format`. mean and rstd (rows,) are results, or operands if `known`. With
// grad and out, which must be given together, also gated = grad where out > 0, else 0, in `format`. z, grad and out are
// in `stream_format`, which is `format` or float32. With float32, x_wide and gated_wide (which may be null) get x and
// gated in float32.
CRATE_API int crate_cuda_layer_norm_forward(
    const void* z, const float* weight, const float* bias, void* x, float* x_wide, float* mean, float* rstd,
    const void* grad, const void* out, void* gated, float* gated_wide, int64_t rows, int columns, int format,
    int stream_format, int known, double eps, void* stream);

// -> dz, dweight and dbias (columns,). If a residual is given, it is added to dz, and its sum over the rows (columns,)
// is a result, too. partial (blocks, 2 or 3, columns) is scratch. dx, z, residual and dz are in `stream_format`.
CRATE_API int crate_cuda_layer_norm_backward(
    const void* dx, const void* z, const float* mean, const float* rstd, const float* weight, const void* residual,
    void* dz, float* partial, float* dweight, float* dbias, float* residual_sum, int64_t rows, int columns, int blocks,
    int stream_format, void* stream);

// out (rows, columns) = alpha a b + c + bias, then ReLU if requested; a is (rows, depth). A stride is that of the
// stored rows. The stored form of a transposed matrix is its transpose. c has the format of out and may be null, and so
// may bias (columns,). a and b have the same `format`.
CRATE_API int crate_cuda_product(
    const void* a, const void* b, const void* c, const void* bias, void* out, int64_t rows, int64_t columns, int64_t depth,
    int64_t a_stride, int a_transposed, int64_t b_stride, int b_transposed, int64_t c_stride, int64_t out_stride, int format,
    int out_format, double alpha, int relu, void* workspace, int64_t workspace_bytes, int device, void* stream);
