#include "crate/layer_norm.cuh"

#include "cuda/launch.h"
#include "simt/python.h"

namespace py = pybind11;

namespace simt {

template <template <class> class Kernel, class Params>
static void run(const Params& params, bool is_bf16, int blocks, const Options& options, Counters& counters) {
    launch(blocks, crate::layer_norm_threads(params.columns), crate::layer_norm_shared_bytes(params.columns), options,
           counters, [&] { is_bf16 ? Kernel<crate::bf16>::run(params, blocks) : Kernel<crate::fp16>::run(params, blocks); });
}
static void run(const crate::ReduceRowsParams& params, const Options& options, Counters& counters) {
    launch(crate::ReduceRows::blocks(params.columns), crate::ReduceRows::kThreads, crate::ReduceRows::kSharedBytes, options,
           counters, [&] { crate::ReduceRows::run(params); });
}

// Fills x and, where given, mean and rstd; with grad and out, gated too.
static Counters layer_norm_forward(const std::string& format, py::array z, py::array weight, py::array bias, py::array x,
                                   std::optional<py::array> mean, std::optional<py::array> rstd,
                                   std::optional<py::array> grad, std::optional<py::array> out,
                                   std::optional<py::array> gated, float eps, int blocks, const Options& options) {
    Counters counters;
    DeviceArray<uint16_t> z_device(z), x_device(x);
    DeviceArray<float> weight_device(weight), bias_device(bias);
    const auto floats = [](const std::optional<py::array>& a) {
        return a ? std::make_unique<DeviceArray<float>>(*a) : nullptr;
    };
    const auto words = [](const std::optional<py::array>& a) {
        return a ? std::make_unique<DeviceArray<uint16_t>>(*a) : nullptr;
    };
    const auto mean_device = floats(mean), rstd_device = floats(rstd);
    const auto grad_device = words(grad), out_device = words(out), gated_device = words(gated);
    const int columns = int(z.shape(1));
    const crate::LayerNormForwardParams params{
        z_device.data(), weight_device.data(), bias_device.data(), x_device.data(),
        mean ? mean_device->data() : nullptr, rstd ? rstd_device->data() : nullptr,
        grad ? grad_device->data() : nullptr, out ? out_device->data() : nullptr,
        gated ? gated_device->data() : nullptr, z.shape(0), columns, eps};
    run<crate::LayerNormForward>(params, is_bf16(format), blocks, options, counters);
    x_device.copy_to(x);
    if (mean) mean_device->copy_to(*mean), rstd_device->copy_to(*rstd);
    if (gated) gated_device->copy_to(*gated);
    return counters;
}

// Fills dz and partial (blocks, 2 or 3, columns).
static Counters layer_norm_backward(const std::string& format, py::array dx, py::array z, py::array mean, py::array rstd,
                                    py::array weight, std::optional<py::array> residual, py::array dz, py::array partial,
                                    const Options& options) {
    Counters counters;
    DeviceArray<uint16_t> dx_device(dx), z_device(z), dz_device(dz);
    DeviceArray<float> mean_device(mean), rstd_device(rstd), weight_device(weight), partial_device(partial);
    std::unique_ptr<DeviceArray<uint16_t>> residual_device;
    if (residual) residual_device = std::make_unique<DeviceArray<uint16_t>>(*residual);
    const int columns = int(z.shape(1)), blocks = int(partial.shape(0));
    const crate::LayerNormBackwardParams params{
        dx_device.data(), z_device.data(), mean_device.data(), rstd_device.data(), weight_device.data(),
        residual ? residual_device->data() : nullptr, dz_device.data(), partial_device.data(), z.shape(0), columns};
    run<crate::LayerNormBackward>(params, is_bf16(format), blocks, options, counters);
    dz_device.copy_to(dz);
    partial_device.copy_to(partial);
    return counters;
}

static Counters reduce_rows(py::array in, py::array out, const Options& options) {
    Counters counters;
    DeviceArray<float> in_device(in), out_device(out);
    const crate::ReduceRowsParams params{in_device.data(), out_device.data(), int(in.shape(0)), int(in.shape(1))};
    run(params, options, counters);
    out_device.copy_to(out);
    return counters;
}

void bind_layer_norm(py::module_& m) {
    m.def("layer_norm_forward", &layer_norm_forward, py::arg("format"), py::arg("z"), py::arg("weight"), py::arg("bias"),
          py::arg("x"), py::arg("mean"), py::arg("rstd"), py::arg("grad"), py::arg("out"), py::arg("gated"),
          py::arg("eps"), py::arg("blocks"), py::arg("options") = Options());
    m.def("layer_norm_backward", &layer_norm_backward, py::arg("format"), py::arg("dx"), py::arg("z"), py::arg("mean"),
          py::arg("rstd"), py::arg("weight"), py::arg("residual"), py::arg("dz"), py::arg("partial"),
          py::arg("options") = Options());
    m.def("reduce_rows", &reduce_rows, py::arg("in"), py::arg("out"), py::arg("options") = Options());
}

}  // namespace simt

namespace crate {

// Few, so that a block takes rows in turn.
constexpr int kForwardBlocks = 3;

Error launch_layer_norm_forward(const LayerNormForwardParams& params, bool is_bf16, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        simt::run<LayerNormForward>(params, is_bf16, kForwardBlocks, options, counters);
        return nullptr;
    });
}

Error launch_layer_norm_backward(const LayerNormBackwardParams& params, bool is_bf16, int blocks, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        simt::run<LayerNormBackward>(params, is_bf16, blocks, options, counters);
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
