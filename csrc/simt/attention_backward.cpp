#include "crate/attention_backward.cuh"

#include "cuda/launch.h"
#include "simt/python.h"

namespace py = pybind11;

namespace simt {

static bool run(const crate::AttentionBackwardParams& params, bool is_bf16, int width, int batch, const Options& options,
                Counters& counters) {
    return crate::dispatch_attention(is_bf16, width, params.tokens, [&]<class T, int kWidth, int kTokens>() {
        using Kernel = crate::AttentionBackward<T, kWidth, kTokens>;
        launch(batch * params.heads, Kernel::warps(params.tokens) * 32, Kernel::shared_bytes(params.tokens), options,
               counters, [&] { Kernel::run(params); });
    });
}

// w, grad, o hold 16-bit patterns, shape (B, N, H, p); dw is filled in place.
static Counters attention_backward(const std::string& format, py::array w, py::array grad, py::array o, py::array lse,
                                   py::array dw, std::optional<py::array> lengths, float scale, bool causal,
                                   const Options& options) {
    const int batch = int(w.shape(0)), tokens = int(w.shape(1)), heads = int(w.shape(2)), width = int(w.shape(3));
    Counters counters;
    DeviceArray<uint16_t> w_device(w), grad_device(grad), o_device(o), dw_device(dw);
    DeviceArray<float> lse_device(lse);
    std::unique_ptr<DeviceArray<int32_t>> lengths_device;
    if (lengths) lengths_device = std::make_unique<DeviceArray<int32_t>>(*lengths);
    const int64_t head_stride = width, token_stride = int64_t(heads) * width, batch_stride = tokens * token_stride;
    const crate::AttentionBackwardParams params{
        w_device.data(), grad_device.data(), o_device.data(), lse_device.data(), dw_device.data(),
        lengths ? lengths_device->data() : nullptr, batch_stride, token_stride, head_stride,
        batch_stride, token_stride, head_stride, tokens, heads, scale, scale * crate::kLog2E, causal};
    if (!run(params, is_bf16(format), width, batch, options, counters))
        throw std::invalid_argument("no kernel for this head");
    dw_device.copy_to(dw);
    return counters;
}

void bind_attention_backward(py::module_& m) {
    m.def("attention_backward", &attention_backward, py::arg("format"), py::arg("w"), py::arg("grad"), py::arg("o"),
          py::arg("lse"), py::arg("dw"), py::arg("lengths"), py::arg("scale"), py::arg("causal"),
          py::arg("options") = Options());
}

}  // namespace simt

namespace crate {

Error launch_attention_backward(const AttentionBackwardParams& params, bool is_bf16, int width, int batch, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        return simt::run(params, is_bf16, width, batch, options, counters) ? nullptr : kNotServed;
    });
}

int attention_backward_shared_bytes(bool is_bf16, int width, int tokens) {
    int bytes = 0;
    dispatch_attention(is_bf16, width, tokens, [&]<class T, int kWidth, int kTokens>() {
        bytes = AttentionBackward<T, kWidth, kTokens>::shared_bytes(tokens);
    });
    return bytes;
}

}  // namespace crate
