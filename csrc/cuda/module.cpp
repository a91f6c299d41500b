// The Python face of the extension: what it was built for. Importing it also registers the operators of binding.cu.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
    m.attr("cuda_version") = CRATE_CUDA_VERSION;  // of the nvcc that built it
    m.attr("architectures") = CRATE_ARCHITECTURES;
    m.attr("torch_target") = CRATE_TORCH_TARGET;  // oldest torch it runs with
}
