// The emulator as a Python module: the project's kernels, run on arrays of 16-bit patterns, and probes of the machine.
#include "simt/python.h"

namespace py = pybind11;

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
    simt::bind_attention_forward(m);
    simt::bind_attention_backward(m);
    simt::bind_layer_norm(m);
    simt::bind_probes(m);
}
