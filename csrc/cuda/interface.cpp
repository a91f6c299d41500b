#include "cuda/interface.h"

#include <string>

#include "cuda/launch.h"

using namespace crate;

namespace {

constexpr int kInterface = 3;
constexpr double kLog2OfE = 1.4426950408889634;

thread_local std::string last_error;

int report(const char* function, Error error) {
    if (error == nullptr) return 0;
    last_error = std::string(function) + ": " + error;
    return 1;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
template <class... Pointers>
Error misaligned(Pointers... pointers) {
    return (aligned(pointers) && ...) ? nullptr : "a tensor does not begin on a 16-byte boundary";
}

Error bad_format(int format, int last) {
    return format >= 0 && format <= last ? nullptr : "the format is not one that the kernel takes";
}

constexpr Error kBadStream = "the residual stream has neither the format of the products nor float32";

Error bad_heads(int batch, int tokens, int heads, int width, int format) {
    if (batch < 0 || heads < 0) return "a size is negative";
    if (Error error = bad_format(format, kFloat16)) return error;
    return attention_forward_shared_bytes(format == kBfloat16, width, tokens) > 0 ? nullptr : kNotServed;
}

Error bad_strides(int64_t batch, int64_t token, int64_t head) {
    const bool rows_aligned = batch % kChunkElements == 0 && token % kChunkElements == 0 && head % kChunkElements == 0;
    return rows_aligned ? nullptr : "rows of a head do not begin on 16-byte boundaries";
}

Error bad_columns(int64_t rows, int columns) {
    if (rows < 0) return "a size is negative";
    const bool served = columns >= 1 && columns % kChunkElements == 0 && columns <= kMaxColumns;
    return served ? nullptr : "the number of columns must be a multiple of 8, up to 2048";
}

// Returns the first pointer that is not null.
template <class... Errors>
Error first(Errors... errors) {
    Error found = nullptr;
    ((found = found ? found : errors), ...);
    return found;
}

}  // namespace

int crate_cuda_interface() { return kInterface; }
const char* crate_cuda_error() { return last_error.c_str(); }
const char* crate_cuda_missing() { return driver_missing(); }
const char* crate_cuda_product_missing() { return product_missing(); }

int crate_cuda_attention_shared_bytes(int backward, int width, int tokens) {
    return backward ? attention_backward_shared_bytes(true, width, tokens) : attention_forward_shared_bytes(true, width, tokens);
}

int crate_cuda_attention_forward(const void* w, void* o, float* lse, const int32_t* lengths, int64_t w_batch_stride,
                                 int64_t w_token_stride, int64_t w_head_stride, int batch, int tokens, int heads, int width,
                                 int format, double scale, int causal, void* stream) {
    const AttentionForwardParams params{w, o, lse, lengths, w_batch_stride, w_token_stride, w_head_stride, tokens, heads,
                                        float(scale * kLog2OfE), causal != 0};
    Error error = first(bad_heads(batch, tokens, heads, width, format), misaligned(w, o),
                        bad_strides(w_batch_stride, w_token_stride, w_head_stride));
    if (!error) error = launch_attention_forward(params, format == kBfloat16, width, batch, stream);
    return report("attention_forward", error);
}

int crate_cuda_attention_backward(const void* grad, const void* w, const void* o, const float* lse, void* dw,
                                  const int32_t* lengths, int64_t grad_batch_stride, int64_t grad_token_stride,
                                  int64_t grad_head_stride, int64_t w_batch_stride, int64_t w_token_stride,
                                  int64_t w_head_stride, int batch, int tokens, int heads, int width, int format,
                                  double scale, int causal, void* stream) {
    const AttentionBackwardParams params{w, grad, o, lse, dw, lengths, w_batch_stride, w_token_stride, w_head_stride,
                                         grad_batch_stride, grad_token_stride, grad_head_stride, tokens, heads,
                                         float(scale), float(scale * kLog2OfE), causal != 0};
    Error error = first(bad_heads(batch, tokens, heads, width, format), misaligned(grad, w, o, dw),
                        bad_strides(w_batch_stride, w_token_stride, w_head_stride),
                        bad_strides(grad_batch_stride, grad_token_stride, grad_head_stride));
    if (!error) error = launch_attention_backward(params, format == kBfloat16, width, batch, stream);
    return report("attention_backward", error);
}

int crate_cuda_layer_norm_forward(const void* z, const float* weight, const float* bias, void* x, float* x_wide, float* mean,
                                  float* rstd, const void* grad, const void* out, void* gated, float* gated_wide,
                                  int64_t rows, int columns, int format, int stream_format, int known, double eps,
                                  void* stream) {
    const LayerNormForwardParams params{z, weight, bias, x, x_wide, mean, rstd, grad, out, gated, gated_wide,
                                        rows, columns, known != 0, float(eps)};
    const bool together = !grad == !out && !grad == !gated;
    Error error = first(bad_columns(rows, columns), bad_format(format, kFloat16),
                        stream_format == format || stream_format == kFloat32 ? nullptr : kBadStream,
                        misaligned(z, weight, bias, x, x_wide, grad, out, gated, gated_wide),
                        together ? nullptr : "grad, out and gated come together");
    if (!error) error = launch_layer_norm_forward(params, format, stream_format, stream);
    return report("layer_norm_forward", error);
}

int crate_cuda_layer_norm_backward(const void* dx, const void* z, const float* mean, const float* rstd, const float* weight,
                                   const void* residual, void* dz, float* partial, float* dweight, float* dbias,
                                   float* residual_sum, int64_t rows, int columns, int blocks, int stream_format,
                                   void* stream) {
    const LayerNormBackwardParams params{dx, z, mean, rstd, weight, residual, dz, partial, rows, columns};
    const ReduceRowsParams reduction{partial, dweight, dbias, residual_sum, blocks, residual ? 3 : 2, columns};
    Error error = first(bad_columns(rows, columns), bad_format(stream_format, kFloat32), misaligned(dx, z, weight, residual, dz, partial),
                        blocks < 0 ? "a size is negative" : nullptr,
                        !residual == !residual_sum ? nullptr : "residual and its sum come together");
    if (!error) error = launch_layer_norm_backward(params, stream_format, blocks, stream);
    if (!error) error = launch_reduce_rows(reduction, stream);
    return report("layer_norm_backward", error);
}

int crate_cuda_product(const void* a, const void* b, const void* c, const void* bias, void* out, int64_t rows,
                       int64_t columns, int64_t depth, int64_t a_stride, int a_transposed, int64_t b_stride,
                       int b_transposed, int64_t c_stride, int64_t out_stride, int format, int out_format, double alpha,
                       int relu, void* workspace, int64_t workspace_bytes, int device, void* stream) {
    const Matrix source{c, rows, columns, c_stride, false, out_format};
    const ProductParams params{{a, rows, depth, a_stride, a_transposed != 0, format},
                               {b, depth, columns, b_stride, b_transposed != 0, format},
                               {out, rows, columns, out_stride, false, out_format},
                               c ? &source : nullptr, bias, float(alpha), c ? 1.0f : 0.0f, relu != 0, workspace,
                               workspace_bytes, device};
    const auto fits = [](const Matrix& m) {
        return m.data == nullptr || m.stride >= (m.transposed ? m.rows : m.columns);
    };
    Error error = first(bad_format(format, kFloat32), bad_format(out_format, kFloat32),
                        rows < 1 || columns < 1 || depth < 1 ? "a size is not positive" : nullptr,
                        fits(params.a) && fits(params.b) && fits(params.out) && fits(source)
                            ? nullptr : "a stride is less than a row",
                        misaligned(bias, workspace));
    if (!error) error = launch_product(params, stream);
    return report("product", error);
}
