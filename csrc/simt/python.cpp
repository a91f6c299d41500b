// The emulator as a Python module: the project's kernels, run on arrays of 16-bit patterns, and probes of the machine.
#include "simt/python.h"

#include "simt/kernels.h"

namespace py = pybind11;

namespace simt {

// w contains 16-bit patterns, shape (B, N, H, p). o and lse are filled in place.
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

// w, grad, o contain 16-bit patterns, shape (B, N, H, p). dw is filled in place.
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

using Rows = std::optional<py::array>;
using Device = std::unique_ptr<DeviceArray<uint8_t>>;

static Device copy(const Rows& rows) { return rows ? std::make_unique<DeviceArray<uint8_t>>(*rows) : nullptr; }
static void* pointer(const Device& device) { return device ? device->data() : nullptr; }
static float* floats(const Device& device) { return reinterpret_cast<float*>(pointer(device)); }
static int format_of(const py::array& rows, const std::string& format) {
    return rows.itemsize() == 4 ? crate::kFloat32 : is_bf16(format) ? crate::kBfloat16 : crate::kFloat16;
}

// Fills x, and also mean and rstd unless they are known. With grad and out, also fills gated. Rows of the stream are in
// `format` or in float32, which their element size shows. If x_wide and gated_wide are given, they are filled as well.
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
    run(params, format_of(x, format), format_of(z, format), blocks, options, counters);
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
    run(params, format_of(z, format), int(partial.shape(0)), options, counters);
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

static void bind_kernels(py::module_& m) {
    m.def("attention_forward", &attention_forward, py::arg("format"), py::arg("w"), py::arg("o"), py::arg("lse"),
          py::arg("lengths"), py::arg("scale"), py::arg("causal"), py::arg("options") = Options());
    m.def("attention_backward", &attention_backward, py::arg("format"), py::arg("w"), py::arg("grad"), py::arg("o"),
          py::arg("lse"), py::arg("dw"), py::arg("lengths"), py::arg("scale"), py::arg("causal"),
          py::arg("options") = Options());
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

PYBIND11_MODULE(crate_simt, m) {
    py::register_exception<simt::Error>(m, "SimtError", PyExc_RuntimeError);
    py::class_<simt::Options>(m, "Options")
        .def(py::init([](uint64_t shuffle_seed, bool check_races, bool count_banks) {
                 return simt::Options{shuffle_seed, check_races, count_banks};
             }),
             py::kw_only(), py::arg("shuffle_seed") = 0, py::arg("check_races") = true, py::arg("count_banks") = false);
    py::class_<simt::Counters>(m, "Counters")
        .def_readonly("global_bytes_read", &simt::Counters::global_bytes_read)
        .def_readonly("global_bytes_written", &simt::Counters::global_bytes_written)
        .def_readonly("mma", &simt::Counters::mma)
        .def_readonly("exp2", &simt::Counters::exp2)
        .def_readonly("barriers", &simt::Counters::barriers)
        .def_readonly("shared_wavefronts", &simt::Counters::shared_wavefronts)
        .def_readonly("bank_conflicts", &simt::Counters::bank_conflicts);
    simt::bind_kernels(m);
    simt::bind_probes(m);
}
