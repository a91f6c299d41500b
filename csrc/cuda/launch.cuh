// Launching a kernel of csrc/include/crate.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace crate {

// The text of an error, which is taken here: the next call would otherwise report it.
inline Error text(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks) head_kernel(const typename Kernel::Params params) {
    Kernel::run(params);
}

// One block a head.
template <class Kernel>
Error launch_heads(const typename Kernel::Params& params, int batch, Stream stream) {
    const int bytes = Kernel::shared_bytes(params.tokens);
    if (bytes > 48 * 1024)
        if (const cudaError_t error =
                cudaFuncSetAttribute(head_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
            return text(error);
    const int64_t blocks = int64_t(batch) * params.heads;
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "there are more heads than a grid has blocks";
    head_kernel<Kernel><<<unsigned(blocks), Kernel::warps(params.tokens) * 32, bytes, cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

}  // namespace crate
