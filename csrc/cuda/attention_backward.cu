#include "crate/attention_backward.cuh"

#include "cuda/launch.cuh"

namespace crate {

Error launch_attention_backward(const AttentionBackwardParams& params, bool is_bf16, int width, int batch, Stream stream) {
    Error error = kNotServed;
    dispatch_attention(is_bf16, width, params.tokens, [&]<class T, int kWidth, int kTokens>() {
        error = launch_heads<AttentionBackward<T, kWidth, kTokens>>(params, batch, stream);
    });
    return error;
}

int attention_backward_shared_bytes(bool is_bf16, int width, int tokens) {
    int bytes = 0;
    dispatch_attention(is_bf16, width, tokens, [&]<class T, int kWidth, int kTokens>() {
        bytes = AttentionBackward<T, kWidth, kTokens>::shared_bytes(tokens);
    });
    return bytes;
}

}  // namespace crate
