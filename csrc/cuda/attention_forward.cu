#include "crate/attention_forward.cuh"

#include "cuda/launch.cuh"

namespace crate {

Error launch_attention_forward(const AttentionForwardParams& params, bool is_bf16, int width, int batch, Stream stream) {
    Error error = kNotServed;
    dispatch_attention(is_bf16, width, params.tokens, [&]<class T, int kWidth, int kTokens>() {
        error = launch_heads<AttentionForward<T, kWidth, kTokens>>(params, batch, stream);
    });
    return error;
}

int attention_forward_shared_bytes(bool is_bf16, int width, int tokens) {
    int bytes = 0;
    dispatch_attention(is_bf16, width, tokens, [&]<class T, int kWidth, int kTokens>() {
        bytes = AttentionForward<T, kWidth, kTokens>::shared_bytes(tokens);
    });
    return bytes;
}

}  // namespace crate
