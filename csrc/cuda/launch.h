// The kernels as host functions: torch-free, each enqueues work on a stream and returns the first error.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace crate {

struct AttentionForwardParams;
struct AttentionBackwardParams;
struct LayerNormForwardParams;
struct LayerNormBackwardParams;
struct ReduceRowsParams;

// cudaErrorInvalidValue where no instantiation serves the head.
cudaError_t launch_attention_forward(const AttentionForwardParams&, bool is_bf16, int width, int batch, cudaStream_t);
cudaError_t launch_attention_backward(const AttentionBackwardParams&, bool is_bf16, int width, int batch, cudaStream_t);
cudaError_t launch_layer_norm_forward(const LayerNormForwardParams&, bool is_bf16, cudaStream_t);
cudaError_t launch_layer_norm_backward(const LayerNormBackwardParams&, bool is_bf16, int blocks, cudaStream_t);
cudaError_t launch_reduce_rows(const ReduceRowsParams&, cudaStream_t);

// Bytes of shared memory a block takes; 0 where no instantiation serves the head.
int attention_forward_shared_bytes(bool is_bf16, int width, int tokens);
int attention_backward_shared_bytes(bool is_bf16, int width, int tokens);

// A row-major matrix, or its transpose.
struct Matrix {
    const void* data;
    int64_t rows, columns, stride;  // stride in elements, between rows of what is stored
    bool transposed;                // rows and columns are those of the matrix as it enters the product
    cudaDataType_t type;
};

// out = alpha a b + beta c + bias, then ReLU if asked; c may be out itself. The bias has the type of out and one element
// a column. Returns a status, and never waits for the device.
cublasStatus_t matrix_product(const Matrix& a, const Matrix& b, const Matrix* c, const void* bias, const Matrix& out,
                              float alpha, float beta, bool relu, void* workspace, size_t workspace_bytes, int device,
                              cudaStream_t);

}  // namespace crate
