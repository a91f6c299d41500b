// Launches a kernel of csrc/include/crate.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cuda/launch.h"

namespace crate {

// Returns the text of an error and clears the error. Otherwise the next call would report it.
inline Error text(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kMaxThreads, Kernel::kMinBlocks) head_kernel(const typename Kernel::Params params) {
    Kernel::run(params);
}

// Allows blocks of a kernel the shared memory that its largest head needs, up to the limit of the device. Also prefers
// shared memory to the cache, so that two blocks fit a multiprocessor. This runs once per device, always with the same
// values: a call that sets only its own need could lower the limit that a call of another thread has set.
template <class Kernel>
cudaError_t prepare() {
    static std::atomic<uint64_t> prepared{0};
    int device, available;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
    if (prepared.load(std::memory_order_acquire) & bit) return cudaSuccess;
    if (const cudaError_t error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
        return error;
    const int bytes = std::min(Kernel::shared_bytes(Kernel::kMostTokens), available);
    if (const cudaError_t error = cudaFuncSetAttribute(head_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
    if (const cudaError_t error = cudaFuncSetAttribute(head_kernel<Kernel>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                       cudaSharedmemCarveoutMaxShared))
        return error;
    prepared.fetch_or(bit, std::memory_order_release);
    return cudaSuccess;
}

// One block per head.
template <class Kernel>
Error launch_heads(const typename Kernel::Params& params, int batch, Stream stream) {
    const int64_t blocks = int64_t(batch) * params.heads;
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "there are more heads than a grid has blocks";
    if (const cudaError_t error = prepare<Kernel>()) return text(error);
    head_kernel<Kernel><<<unsigned(blocks), Kernel::warps(params.tokens) * 32, Kernel::shared_bytes(params.tokens),
                          cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

}  // namespace crate
