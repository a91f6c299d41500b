// The torch binding, on the stable ABI: operators of the namespace crate_cuda that write into tensors their callers
// allocate. They check what would make a kernel read or write out of bounds; shapes and dtypes as a user sees them are
// checked by the Python operators above.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "crate/attention_backward.cuh"
#include "crate/attention_forward.cuh"
#include "crate/layer_norm.cuh"
#include "cuda/launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace crate {

static cudaStream_t current_stream(const Tensor& t) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

static void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) cudaGetLastError();  // taken here, or the next check of any other kernel reports it
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The format of a 16-bit tensor: true for bfloat16.
static bool is_bf16(const Tensor& t, const char* name) {
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected bfloat16 or float16");
    return type == ScalarType::BFloat16;
}

static void check_tensor(const Tensor& t, const Tensor& like, ScalarType type, int64_t elements, const char* name) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, ": is on another device");
    STD_TORCH_CHECK(t.scalar_type() == type, name, ": has an unexpected dtype");
    STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
    STD_TORCH_CHECK(t.numel() == elements, name, ": has ", t.numel(), " elements, expected ", elements);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, ": must be aligned to 16 bytes");
}

// (B, N, H, p) with unit last stride and rows on 16-byte boundaries.
static void check_heads(const Tensor& t, const Tensor& like, const char* name) {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, ": is on another device");
    STD_TORCH_CHECK(t.dim() == 4, name, ": expected four dimensions");
    for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(t.size(d) == like.size(d), name, ": has an unexpected shape");
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": has an unexpected dtype");
    STD_TORCH_CHECK(t.stride(3) == 1, name, ": the last stride must be one");
    for (int d = 0; d < 3; ++d)
        STD_TORCH_CHECK(t.stride(d) % kChunkElements == 0, name, ": rows must be aligned to 16 bytes");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, name, ": must be aligned to 16 bytes");
}

static const int32_t* lengths_pointer(const std::optional<Tensor>& lengths, const Tensor& w) {
    if (!lengths) return nullptr;
    check_tensor(*lengths, w, ScalarType::Int, w.size(0), "lengths");
    return static_cast<const int32_t*>(lengths->data_ptr());
}

static void attention_forward(Tensor w, Tensor o, Tensor lse, std::optional<Tensor> lengths, double scale, bool causal) {
    const bool bf16 = is_bf16(w, "w");
    check_heads(w, w, "w");
    check_tensor(o, w, w.scalar_type(), w.numel(), "o");
    check_tensor(lse, w, ScalarType::Float, w.size(0) * w.size(1) * w.size(2), "lse");
    const AttentionForwardParams params{
        w.data_ptr(), o.data_ptr(), static_cast<float*>(lse.data_ptr()), lengths_pointer(lengths, w),
        w.stride(0), w.stride(1), w.stride(2), int(w.size(1)), int(w.size(2)), float(scale * double(kLog2E)), causal};
    const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
    check(launch_attention_forward(params, bf16, int(w.size(3)), int(w.size(0)), current_stream(w)), "attention_forward");
}

static void attention_backward(Tensor grad, Tensor w, Tensor o, Tensor lse, Tensor dw, std::optional<Tensor> lengths,
                               double scale, bool causal) {
    const bool bf16 = is_bf16(w, "w");
    check_heads(w, w, "w");
    check_heads(grad, w, "grad");
    check_tensor(o, w, w.scalar_type(), w.numel(), "o");
    check_tensor(dw, w, w.scalar_type(), w.numel(), "dw");
    check_tensor(lse, w, ScalarType::Float, w.size(0) * w.size(1) * w.size(2), "lse");
    const AttentionBackwardParams params{
        w.data_ptr(), grad.data_ptr(), o.data_ptr(), static_cast<const float*>(lse.data_ptr()), dw.data_ptr(),
        lengths_pointer(lengths, w), w.stride(0), w.stride(1), w.stride(2),
        grad.stride(0), grad.stride(1), grad.stride(2), int(w.size(1)), int(w.size(2)),
        float(scale), float(scale * double(kLog2E)), causal};
    const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
    check(launch_attention_backward(params, bf16, int(w.size(3)), int(w.size(0)), current_stream(w)), "attention_backward");
}

static int64_t attention_shared_bytes(bool backward, bool bf16, int64_t width, int64_t tokens) {
    return (backward ? attention_backward_shared_bytes : attention_forward_shared_bytes)(bf16, int(width), int(tokens));
}

static void check_columns(const Tensor& z) {
    STD_TORCH_CHECK(z.dim() == 2, "z: expected two dimensions");
    STD_TORCH_CHECK(z.size(1) % kChunkElements == 0 && z.size(1) > 0 && z.size(1) <= kMaxColumns,
                    "z: the number of columns must be a multiple of 8, up to ", kMaxColumns, "; got ", z.size(1));
}

static void layer_norm_forward(Tensor z, Tensor weight, Tensor bias, Tensor x, Tensor mean, Tensor rstd, double eps) {
    const bool bf16 = is_bf16(z, "z");
    check_columns(z);
    check_tensor(z, z, z.scalar_type(), z.numel(), "z");
    check_tensor(weight, z, ScalarType::Float, z.size(1), "weight");
    check_tensor(bias, z, ScalarType::Float, z.size(1), "bias");
    check_tensor(x, z, z.scalar_type(), z.numel(), "x");
    check_tensor(mean, z, ScalarType::Float, z.size(0), "mean");
    check_tensor(rstd, z, ScalarType::Float, z.size(0), "rstd");
    const LayerNormForwardParams params{z.data_ptr(), static_cast<const float*>(weight.data_ptr()),
                                        static_cast<const float*>(bias.data_ptr()), x.data_ptr(),
                                        static_cast<float*>(mean.data_ptr()), static_cast<float*>(rstd.data_ptr()),
                                        nullptr, nullptr, nullptr, z.size(0), int(z.size(1)), float(eps)};
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    check(launch_layer_norm_forward(params, bf16, current_stream(z)), "layer_norm_forward");
}

static void layer_norm_again(Tensor z, Tensor weight, Tensor bias, Tensor x, std::optional<Tensor> grad,
                             std::optional<Tensor> out, std::optional<Tensor> gated, double eps) {
    const bool bf16 = is_bf16(z, "z");
    check_columns(z);
    check_tensor(z, z, z.scalar_type(), z.numel(), "z");
    check_tensor(weight, z, ScalarType::Float, z.size(1), "weight");
    check_tensor(bias, z, ScalarType::Float, z.size(1), "bias");
    check_tensor(x, z, z.scalar_type(), z.numel(), "x");
    STD_TORCH_CHECK(bool(grad) == bool(out) && bool(grad) == bool(gated), "grad, out and gated come together");
    if (grad) check_tensor(*grad, z, z.scalar_type(), z.numel(), "grad");
    if (out) check_tensor(*out, z, z.scalar_type(), z.numel(), "out");
    if (gated) check_tensor(*gated, z, z.scalar_type(), z.numel(), "gated");
    const LayerNormForwardParams params{z.data_ptr(), static_cast<const float*>(weight.data_ptr()),
                                        static_cast<const float*>(bias.data_ptr()), x.data_ptr(), nullptr, nullptr,
                                        grad ? grad->data_ptr() : nullptr, out ? out->data_ptr() : nullptr,
                                        gated ? gated->data_ptr() : nullptr, z.size(0), int(z.size(1)), float(eps)};
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    check(launch_layer_norm_forward(params, bf16, current_stream(z)), "layer_norm_again");
}

static void layer_norm_backward(Tensor dx, Tensor z, Tensor mean, Tensor rstd, Tensor weight,
                                std::optional<Tensor> residual, Tensor dz, Tensor partial, Tensor sums) {
    const bool bf16 = is_bf16(z, "z");
    check_columns(z);
    check_tensor(z, z, z.scalar_type(), z.numel(), "z");
    check_tensor(dx, z, z.scalar_type(), z.numel(), "dx");
    check_tensor(dz, z, z.scalar_type(), z.numel(), "dz");
    if (residual) check_tensor(*residual, z, z.scalar_type(), z.numel(), "residual");
    check_tensor(mean, z, ScalarType::Float, z.size(0), "mean");
    check_tensor(rstd, z, ScalarType::Float, z.size(0), "rstd");
    check_tensor(weight, z, ScalarType::Float, z.size(1), "weight");
    const int64_t blocks = partial.size(0), width = (residual ? 3 : 2) * z.size(1);
    check_tensor(partial, z, ScalarType::Float, blocks * width, "partial");
    check_tensor(sums, z, ScalarType::Float, width, "sums");
    const LayerNormBackwardParams params{
        dx.data_ptr(), z.data_ptr(), static_cast<const float*>(mean.data_ptr()), static_cast<const float*>(rstd.data_ptr()),
        static_cast<const float*>(weight.data_ptr()), residual ? residual->data_ptr() : nullptr, dz.data_ptr(),
        static_cast<float*>(partial.data_ptr()), z.size(0), int(z.size(1))};
    const ReduceRowsParams reduction{params.partial, static_cast<float*>(sums.data_ptr()), int(blocks), int(width)};
    const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
    check(launch_layer_norm_backward(params, bf16, int(blocks), current_stream(z)), "layer_norm_backward");
    check(launch_reduce_rows(reduction, current_stream(z)), "reduce_rows");
}

static Matrix matrix(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda() && t.dim() == 2, name, ": expected a matrix on a CUDA device");
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float, name,
                    ": expected bfloat16, float16 or float32");
    // A matrix of one row or column may carry any stride there.
    const bool rows = t.stride(1) == 1 && (t.stride(0) >= t.size(1) || t.size(0) == 1);
    const bool columns = t.stride(0) == 1 && (t.stride(1) >= t.size(0) || t.size(1) == 1);
    STD_TORCH_CHECK(rows || columns, name, ": one stride must be one");
    const int64_t stride = rows ? std::max(t.stride(0), t.size(1)) : std::max(t.stride(1), t.size(0));
    return {t.data_ptr(), t.size(0), t.size(1), stride, !rows,
            type == ScalarType::BFloat16 ? CUDA_R_16BF : type == ScalarType::Half ? CUDA_R_16F : CUDA_R_32F};
}

static void product(Tensor a, Tensor b, std::optional<Tensor> c, std::optional<Tensor> bias, Tensor out, Tensor workspace,
                    double alpha, double beta, bool relu) {
    const Matrix left = matrix(a, "a"), right = matrix(b, "b"), result = matrix(out, "out");
    STD_TORCH_CHECK(left.columns == right.rows && left.rows == result.rows && right.columns == result.columns,
                    "product: the shapes do not fit");
    STD_TORCH_CHECK(!result.transposed, "out: the last stride must be one");
    Matrix source = result;
    if (c) {
        source = matrix(*c, "c");
        STD_TORCH_CHECK(source.rows == result.rows && source.columns == result.columns && source.type == result.type &&
                            !source.transposed,
                        "c: must be like out");
    }
    if (bias) check_tensor(*bias, out, out.scalar_type(), result.columns, "bias");
    STD_TORCH_CHECK(left.type == right.type, "a, b: must have one dtype");
    const int device = out.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cublasStatus_t status = matrix_product(
        left, right, c ? &source : nullptr, bias ? bias->data_ptr() : nullptr, result, float(alpha), c ? float(beta) : 0.0f,
        relu, workspace.data_ptr(), size_t(workspace.numel()) * workspace.element_size(), device, current_stream(out));
    STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "product: cuBLASLt: ", cublasLtGetStatusString(status));
}

}  // namespace crate

STABLE_TORCH_LIBRARY(crate_cuda, m) {
    m.def("attention_forward(Tensor w, Tensor(a!) o, Tensor(b!) lse, Tensor? lengths, float scale, bool causal) -> ()");
    m.def("attention_backward(Tensor grad, Tensor w, Tensor o, Tensor lse, Tensor(a!) dw, Tensor? lengths, float scale,"
          " bool causal) -> ()");
    m.def("attention_shared_bytes(bool backward, bool bf16, int width, int tokens) -> int");
    m.def("layer_norm_forward(Tensor z, Tensor weight, Tensor bias, Tensor(a!) x, Tensor(b!) mean, Tensor(c!) rstd,"
          " float eps) -> ()");
    m.def("layer_norm_again(Tensor z, Tensor weight, Tensor bias, Tensor(a!) x, Tensor? grad, Tensor? out,"
          " Tensor(b!)? gated, float eps) -> ()");
    m.def("layer_norm_backward(Tensor dx, Tensor z, Tensor mean, Tensor rstd, Tensor weight, Tensor? residual,"
          " Tensor(a!) dz, Tensor(b!) partial, Tensor(c!) sums) -> ()");
    m.def("product(Tensor a, Tensor b, Tensor? c, Tensor? bias, Tensor(a!) out, Tensor(b!) workspace, float alpha,"
          " float beta, bool relu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(crate_cuda, CUDA, m) {
    m.impl("attention_forward", TORCH_BOX(&crate::attention_forward));
    m.impl("attention_backward", TORCH_BOX(&crate::attention_backward));
    m.impl("layer_norm_forward", TORCH_BOX(&crate::layer_norm_forward));
    m.impl("layer_norm_again", TORCH_BOX(&crate::layer_norm_again));
    m.impl("layer_norm_backward", TORCH_BOX(&crate::layer_norm_backward));
    m.impl("product", TORCH_BOX(&crate::product));
}

STABLE_TORCH_LIBRARY_IMPL(crate_cuda, CompositeExplicitAutograd, m) {
    m.impl("attention_shared_bytes", TORCH_BOX(&crate::attention_shared_bytes));
}
