#include "crate/layer_norm.cuh"

#include <algorithm>

#include "crate/dispatch.h"
#include "cuda/launch.cuh"

namespace crate {

// Enough blocks to fill any device several times. Each block then computes several rows in turn.
constexpr int64_t kForwardBlocks = 4096;

template <class Kernel>
__global__ void __launch_bounds__(kMaxColumns / kChunkElements, 1) rows_kernel(const typename Kernel::Params params) {
    Kernel::run(params, gridDim.x);
}
__global__ void __launch_bounds__(ReduceRows::kThreads) reduce_rows_kernel(const ReduceRowsParams params) {
    ReduceRows::run(params);
}

template <class Kernel>
static Error launch_rows(const typename Kernel::Params& params, int64_t blocks, Stream stream) {
    const int threads = layer_norm_threads(params.columns), bytes = layer_norm_shared_bytes(params.columns);
    if (blocks == 0) return nullptr;
    rows_kernel<Kernel><<<unsigned(blocks), threads, bytes, cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

Error launch_layer_norm_forward(const LayerNormForwardParams& params, int format, int stream_format, Stream stream) {
    const int64_t groups = (params.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    return dispatch_stream(format, stream_format, [&]<class T, class S>() {
        return launch_rows<LayerNormForward<T, S>>(params, std::min(groups, kForwardBlocks), stream);
    });
}

Error launch_layer_norm_backward(const LayerNormBackwardParams& params, int stream_format, int blocks, Stream stream) {
    return dispatch_stream(stream_format, stream_format, [&]<class T, class S>() {
        return launch_rows<LayerNormBackward<S>>(params, blocks, stream);
    });
}

Error launch_reduce_rows(const ReduceRowsParams& params, Stream stream) {
    reduce_rows_kernel<<<ReduceRows::blocks(params), ReduceRows::kThreads, ReduceRows::kSharedBytes,
                         cudaStream_t(stream)>>>(params);
    return text(cudaGetLastError());
}

}  // namespace crate
