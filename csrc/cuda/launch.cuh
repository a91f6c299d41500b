// Launching a kernel of csrc/include/crate.
#pragma once

#include "cuda/launch.h"

namespace crate {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks) head_kernel(const typename Kernel::Params params) {
    Kernel::run(params);
}

// One block a head.
template <class Kernel>
cudaError_t launch_heads(const typename Kernel::Params& params, int batch, cudaStream_t stream) {
    const int bytes = Kernel::shared_bytes(params.tokens);
    if (bytes > 48 * 1024)
        if (const cudaError_t error =
                cudaFuncSetAttribute(head_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
            return error;
    const int64_t blocks = int64_t(batch) * params.heads;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    head_kernel<Kernel><<<unsigned(blocks), Kernel::warps(params.tokens) * 32, bytes, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace crate
