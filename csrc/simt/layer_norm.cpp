#include "crate/layer_norm.cuh"

#include "crate/dispatch.h"
#include "cuda/launch.h"
#include "simt/kernels.h"

namespace simt {

template <class Kernel>
static void run_rows(const typename Kernel::Params& params, int blocks, const Options& options, Counters& counters) {
    launch(blocks, crate::layer_norm_threads(params.columns), crate::layer_norm_shared_bytes(params.columns), options,
           counters, [&] { Kernel::run(params, blocks); });
}

void run(const crate::LayerNormForwardParams& params, int format, int stream_format, int blocks, const Options& options,
         Counters& counters) {
    crate::dispatch_stream(format, stream_format, [&]<class T, class S>() {
        run_rows<crate::LayerNormForward<T, S>>(params, blocks, options, counters);
    });
}

void run(const crate::LayerNormBackwardParams& params, int stream_format, int blocks, const Options& options,
         Counters& counters) {
    crate::dispatch_stream(stream_format, stream_format, [&]<class T, class S>() {
        run_rows<crate::LayerNormBackward<S>>(params, blocks, options, counters);
    });
}

void run(const crate::ReduceRowsParams& params, const Options& options, Counters& counters) {
    launch(crate::ReduceRows::blocks(params), crate::ReduceRows::kThreads, crate::ReduceRows::kSharedBytes, options,
           counters, [&] { crate::ReduceRows::run(params); });
}

}  // namespace simt

namespace crate {

// Few blocks, so that each block computes several rows in turn.
constexpr int kForwardBlocks = 3;

Error launch_layer_norm_forward(const LayerNormForwardParams& params, int format, int stream_format, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        simt::run(params, format, stream_format, kForwardBlocks, options, counters);
        return nullptr;
    });
}

Error launch_layer_norm_backward(const LayerNormBackwardParams& params, int stream_format, int blocks, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        simt::run(params, stream_format, blocks, options, counters);
        return nullptr;
    });
}

Error launch_reduce_rows(const ReduceRowsParams& params, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        simt::run(params, options, counters);
        return nullptr;
    });
}

}  // namespace crate
