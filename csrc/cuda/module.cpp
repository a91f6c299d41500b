// The Python face of the extension: what it was built for. Importing it also registers the operators of binding.cu.
// Plain CPython: torch's copy of pybind11 refuses to be compiled beside the stable ABI.
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit__C() {
    PyObject* module = PyModule_Create(&definition);
    if (module == nullptr
        || PyModule_AddStringConstant(module, "cuda_version", CRATE_CUDA_VERSION) < 0       // of the nvcc that built it
        || PyModule_AddStringConstant(module, "architectures", CRATE_ARCHITECTURES) < 0
        || PyModule_AddStringConstant(module, "torch_target", CRATE_TORCH_TARGET) < 0) {  // oldest torch it runs with
        Py_XDECREF(module);
        return nullptr;
    }
    return module;
}
