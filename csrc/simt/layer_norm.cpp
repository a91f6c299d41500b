#include "crate/layer_norm.cuh"

#include "crate/dispatch.h"
#include "cuda/launch.h"
#include "simt/python.h"

namespace py = pybind11;

namespace simt {

template <class Kernel>
static void run(const typename Kernel::Params& params, int blocks, const Options& options, Counters& counters) {
    launch(blocks, crate::layer_norm_threads(params.columns), crate::layer_norm_shared_bytes(params.columns), options,
           counters, [&] { Kernel::run(params, blocks); });
}
static void run(const crate::ReduceRowsParams& params, const Options& options, Counters& counters) {
    launch(crate::ReduceRows::blocks(params), crate::ReduceRows::kThreads, crate::ReduceRows::kSharedBytes, options,
           counters, [&] { crate::ReduceRows::run(params); });
}

using Rows = std::optional<py::array>;
using Device = std::unique_ptr<DeviceArray<uint8_t>>;

static Device copy(const Rows& rows) { return rows ? std::make_unique<DeviceArray<uint8_t>>(*rows) : nullptr; }
static void* pointer(const Device& device) { return device ? device->data() : nullptr; }
static float* floats(const Device& device) { return reinterpret_cast<float*>(pointer(device)); }
static int format_of(const py::array& rows, const std::string& format) {
    return rows.itemsize() == 4 ? crate::kFloat32 : is_bf16(format) ? crate::kBfloat16 : crate::kFloat16;
}

// Fills x, and mean and rstd unless they are known; with grad and out, gated too. Rows of the stream are in `format`, or in
// float32, as their elements say; then x_wide and gated_wide are filled as well where they are given.
static Counters layer_norm_forward(const std::string& format, py::array z, py::array weight, py::array bias, py::array x,
                                   Rows x_wide, py::array mean, py::array rstd, Rows grad, Rows out, Rows gated,
                                   Rows gated_wide, float eps, int blocks, bool known, const Options& options) {
    Counters counters;
    const Device z_device = copy(z), weight_device = copy(weight), bias_device = copy(bias), x_device = copy(x),
                 x_wide_device = copy(x_wide), mean_device = copy(mean), rstd_device = copy(rstd),
                 grad_device = copy(grad), out_device = copy(out), gated_device = copy(gated),
                 gated_wide_device = copy(gated_wide);
    const crate::LayerNormForwardParams params{
        pointer(z_device), floats(weight_device), floats(bias_device), pointer(x_device), floats(x_wide_device),
        floats(mean_device), floats(rstd_device), pointer(grad_device), pointer(out_device), pointer(gated_device),
        floats(gated_wide_device), z.shape(0), int(z.shape(1)), known, eps};
    crate::dispatch_stream(format_of(x, format), format_of(z, format), [&]<class T, class S>() {
        run<crate::LayerNormForward<T, S>>(params, blocks, options, counters);
    });
    x_device->copy_to(x);
    mean_device->copy_to(mean);
    rstd_device->copy_to(rstd);
    if (x_wide) x_wide_device->copy_to(*x_wide);
    if (gated) gated_device->copy_to(*gated);
    if (gated_wide) gated_wide_device->copy_to(*gated_wide);
    return counters;
}

// Fills dz and partial (blocks, 2 or 3, columns).
static Counters layer_norm_backward(const std::string& format, py::array dx, py::array z, py::array mean, py::array rstd,
                                    py::array weight, Rows residual, py::array dz, py::array partial,
                                    const Options& options) {
    Counters counters;
    const Device dx_device = copy(dx), z_device = copy(z), mean_device = copy(mean), rstd_device = copy(rstd),
                 weight_device = copy(weight), residual_device = copy(residual), dz_device = copy(dz),
                 partial_device = copy(partial);
    const crate::LayerNormBackwardParams params{
        pointer(dx_device), pointer(z_device), floats(mean_device), floats(rstd_device), floats(weight_device),
        pointer(residual_device), pointer(dz_device), floats(partial_device), z.shape(0), int(z.shape(1))};
    const int stream_format = format_of(z, format);
    crate::dispatch_stream(stream_format, stream_format, [&]<class T, class S>() {
        run<crate::LayerNormBackward<S>>(params, int(partial.shape(0)), options, counters);
    });
    dz_device->copy_to(dz);
    partial_device->copy_to(partial);
    return counters;
}

static Counters reduce_rows(py::array in, py::array out, const Options& options) {
    Counters counters;
    DeviceArray<float> in_device(in), out_device(out);
    const crate::ReduceRowsParams params{in_device.data(), out_device.data(), nullptr, nullptr, int(in.shape(0)), 1, int(in.shape(1))};
    run(params, options, counters);
    out_device.copy_to(out);
    return counters;
}

void bind_layer_norm(py::module_& m) {
    m.def("layer_norm_forward", &layer_norm_forward, py::arg("format"), py::arg("z"), py::arg("weight"), py::arg("bias"),
          py::arg("x"), py::arg("x_wide"), py::arg("mean"), py::arg("rstd"), py::arg("grad"), py::arg("out"),
          py::arg("gated"), py::arg("gated_wide"), py::arg("eps"), py::arg("blocks"), py::arg("known") = false,
          py::arg("options") = Options());
    m.def("layer_norm_backward", &layer_norm_backward, py::arg("format"), py::arg("dx"), py::arg("z"), py::arg("mean"),
          py::arg("rstd"), py::arg("weight"), py::arg("residual"), py::arg("dz"), py::arg("partial"),
          py::arg("options") = Options());
    m.def("reduce_rows", &reduce_rows, py::arg("in"), py::arg("out"), py::arg("options") = Options());
}

}  // namespace simt

namespace crate {

// Few, so that a block takes rows in turn.
constexpr int kForwardBlocks = 3;

Error launch_layer_norm_forward(const LayerNormForwardParams& params, int format, int stream_format, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        dispatch_stream(format, stream_format, [&]<class T, class S>() {
            simt::run<LayerNormForward<T, S>>(params, kForwardBlocks, options, counters);
        });
        return nullptr;
    });
}

Error launch_layer_norm_backward(const LayerNormBackwardParams& params, int stream_format, int blocks, Stream) {
    return simt::guarded([&](const simt::Options& options, simt::Counters& counters) {
        dispatch_stream(stream_format, stream_format, [&]<class T, class S>() {
            simt::run<LayerNormBackward<S>>(params, blocks, options, counters);
        });
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
