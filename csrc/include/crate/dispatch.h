// Chooses the instantiation of a kernel for a call. All shapes and formats that are built are listed here.
#pragma once

#include "crate/numeric.h"

namespace crate {

// Heads of up to 208 tokens (13 row tiles; ViT with patch size 16 has 197) leave more registers to each warp than
// larger heads.
constexpr int kSmallTokens = 208, kMaxTokens = 272;

// Calls f.template operator()<T, kWidth, kMaxTokens>(). Returns false if there is no instantiation for this head.
template <class F>
bool dispatch_attention(bool is_bf16, int width, int tokens, F f) {
    const auto by_tokens = [&]<class T, int kWidth>() {
        if (tokens <= kSmallTokens)
            f.template operator()<T, kWidth, kSmallTokens>();
        else
            f.template operator()<T, kWidth, kMaxTokens>();
        return true;
    };
    const auto by_width = [&]<class T>() {
        switch (width) {
            case 16: return by_tokens.template operator()<T, 16>();
            case 32: return by_tokens.template operator()<T, 32>();
            case 48: return by_tokens.template operator()<T, 48>();
            case 64: return by_tokens.template operator()<T, 64>();
            case 80: return by_tokens.template operator()<T, 80>();
            case 96: return by_tokens.template operator()<T, 96>();
            case 128: return by_tokens.template operator()<T, 128>();
            default: return false;
        }
    };
    if (tokens < 1 || tokens > kMaxTokens) return false;
    return is_bf16 ? by_width.template operator()<bf16>() : by_width.template operator()<fp16>();
}

// Calls f.template operator()<T, S>() for the format of the products and that of the stream.
template <class F>
auto dispatch_stream(int format, int stream_format, F f) {
    if (stream_format == kFloat32)
        return format == kBfloat16 ? f.template operator()<bf16, float>() : f.template operator()<fp16, float>();
    return format == kBfloat16 ? f.template operator()<bf16, bf16>() : f.template operator()<fp16, fp16>();
}

}  // namespace crate
