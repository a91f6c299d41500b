#include "crate/attention_forward.cuh"

#include "cuda/launch.h"
#include "simt/python.h"

namespace py = pybind11;

namespace simt {

static bool run(const crate::AttentionForwardParams& params, bool is_bf16, int width, int batch, const Options& options,
                Counters& counters) {
    return crate::dispatch_attention(is_bf16, width, params.tokens, [&]<class T, int kWidth, int kTokens>() {
        using Kernel = crate::AttentionForward<T, kWidth, kTokens>;
        launch(batch * params.heads, Kernel::warps(params.tokens) * 32, Kernel::shared_bytes(params.tokens), options,
               counters, [&] { Kernel::run(params); });
    });
}

// w holds 16-bit patterns, shape (B, N, H, p); o and lse are filled in place.
static Counters attention_forward(const std::string& format, py::array w, py::array o, py::array lse,
                                  std::optional<py::array> lengths, float scale, bool causal, const Options& options) {
    const int batch = int(w.shape(0)), tokens = int(w.shape(1)), heads = int(w.shape(2)), width = int(w.shape(3));
    Counters counters;
    DeviceArray<uint16_t> w_device(w), o_device(o);
    DeviceArray<float> lse_device(lse);
    std::unique_ptr<DeviceArray<int32_t>> lengths_device;
    if (lengths) lengths_device = std::make_unique<DeviceArray<int32_t>>(*lengths);
    const crate::AttentionForwardParams params{
        w_device.data(), o_device.data(), lse_device.data(), lengths ? lengths_device->data() : nullptr,
        int64_t(tokens) * heads * width, int64_t(heads) * width, width, tokens, heads, scale * crate::kLog2E, causal};
    if (!run(params, is_bf16(format), width, batch, options, counters))
        throw std::invalid_argument("no kernel for this head");
    o_device.copy_to(o);
    lse_device.copy_to(lse);
    return counters;
}

void bind_attention_forward(py::module_& m) {
    m.def("attention_forward", &attention_forward, py::arg("format"), py::arg("w"), py::arg("o"), py::arg("lse"),
          py::arg("lengths"), py::arg("scale"), py::arg("causal"), py::arg("options") = Options());
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
