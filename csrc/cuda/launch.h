// The kernels as host functions. Each enqueues work on a stream, does not wait, and returns an error. This header
// includes none of CUDA's headers, because the emulator of csrc/simt implements the same functions.
#pragma once

#include "crate/params.h"

namespace crate {

using Error = const char*;  // null for success, or a text with static lifetime
using Stream = void*;       // a cudaStream_t

constexpr Error kNotServed = "no kernel was built for heads of this width and number of tokens";

Error launch_attention_forward(const AttentionForwardParams&, bool is_bf16, int width, int batch, Stream);
Error launch_attention_backward(const AttentionBackwardParams&, bool is_bf16, int width, int batch, Stream);
// `stream_format` is `format` or float32.
Error launch_layer_norm_forward(const LayerNormForwardParams&, int format, int stream_format, Stream);
Error launch_layer_norm_backward(const LayerNormBackwardParams&, int stream_format, int blocks, Stream);
Error launch_reduce_rows(const ReduceRowsParams&, Stream);

// Bytes of shared memory that a block needs; 0 if there is no kernel for the head.
int attention_forward_shared_bytes(bool is_bf16, int width, int tokens);
int attention_backward_shared_bytes(bool is_bf16, int width, int tokens);

// out = alpha a b + beta c + bias, then ReLU if asked; c may be out itself.
Error launch_product(const ProductParams&, Stream);

Error driver_missing();   // the reason why no kernel can run with the driver of this machine; null if they can
Error product_missing();  // the reason why launch_product cannot run; null if it can

}  // namespace crate
