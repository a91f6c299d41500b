#include "crate/attention_forward.cuh"

#include "cuda/launch.h"
#include "simt/kernels.h"

namespace simt {

bool run(const crate::AttentionForwardParams& params, bool is_bf16, int width, int batch, const Options& options,
         Counters& counters) {
    return crate::dispatch_attention(is_bf16, width, params.tokens, [&]<class T, int kWidth, int kTokens>() {
        using Kernel = crate::AttentionForward<T, kWidth, kTokens>;
        launch(batch * params.heads, Kernel::warps(params.tokens) * 32, Kernel::shared_bytes(params.tokens), options,
               counters, [&] { Kernel::run(params); });
    });
}

}  // namespace simt

namespace crate {

Error launch_attention_forward(const AttentionForwardParams& params, bool is_bf16, int width, int batch, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        return simt::run(params, is_bf16, width, batch, options, counters) ? nullptr : kNotServed;
    });
}

int attention_forward_shared_bytes(bool is_bf16, int width, int tokens) {
    int bytes = 0;
    dispatch_attention(is_bf16, width, tokens, [&]<class T, int kWidth, int kTokens>() {
        bytes = AttentionForward<T, kWidth, kTokens>::shared_bytes(tokens);
    });
    return bytes;
}

}  // namespace crate
