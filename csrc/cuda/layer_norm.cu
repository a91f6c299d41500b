#include "crate/layer_norm.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace crate {

// Enough blocks to fill any device a few times over; each then takes rows in turn.
constexpr int64_t kForwardBlocks = 4096;

template <class Kernel>
__global__ void __launch_bounds__(kMaxColumns / kChunkElements) rows_kernel(const typename Kernel::Params params) {
    Kernel::run(params, gridDim.x);
}
__global__ void __launch_bounds__(ReduceRows::kThreads) reduce_rows_kernel(const ReduceRowsParams params) {
    ReduceRows::run(params);
}

template <template <class> class Kernel, class Params>
static Error launch_rows(const Params& params, bool is_bf16, int blocks, Stream stream) {
    const int threads = layer_norm_threads(params.columns), bytes = layer_norm_shared_bytes(params.columns);
    if (blocks == 0) return nullptr;
    if (is_bf16)
        rows_kernel<Kernel<bf16>><<<blocks, threads, bytes, cudaStream_t(stream)>>>(params);
    else
        rows_kernel<Kernel<fp16>><<<blocks, threads, bytes, cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

Error launch_layer_norm_forward(const LayerNormForwardParams& params, bool is_bf16, Stream stream) {
    const int64_t groups = (params.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    return launch_rows<LayerNormForward>(params, is_bf16, int(std::min(groups, kForwardBlocks)), stream);
}

Error launch_layer_norm_backward(const LayerNormBackwardParams& params, bool is_bf16, int blocks, Stream stream) {
    return launch_rows<LayerNormBackward>(params, is_bf16, blocks, stream);
}

Error launch_reduce_rows(const ReduceRowsParams& params, Stream stream) {
    if (params.columns == 0) return nullptr;
    reduce_rows_kernel<<<ReduceRows::blocks(params.columns), ReduceRows::kThreads, ReduceRows::kSharedBytes,
                         cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

}  // namespace crate
