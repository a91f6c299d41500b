// Shared code of the emulator's Python side: arrays as on a device, and the parts of the module. The kernels do not
// include this header, because pybind11 takes longer to compile than the kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "crate/numeric.h"
#include "simt/machine.h"

namespace simt {

// Copies an array to a heap block of exactly its size, aligned as device memory is, so that AddressSanitizer sees any
// access beyond it; copies back on request.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t size) : size_(size), data_(new (std::align_val_t(16)) T[size]) {}
    // Bytes are copied from elements of any size.
    explicit DeviceArray(const pybind11::array& from) : DeviceArray(size_t(from.nbytes()) / sizeof(T)) {
        if ((sizeof(T) > 1 && from.itemsize() != sizeof(T)) || !(from.flags() & pybind11::array::c_style))
            throw std::invalid_argument("expected a contiguous array with elements of " + std::to_string(sizeof(T)) + " bytes");
        std::memcpy(data_, from.data(), size_ * sizeof(T));
    }
    DeviceArray(const DeviceArray&) = delete;
    ~DeviceArray() { operator delete[](data_, std::align_val_t(16)); }
    T* data() { return data_; }
    void copy_to(pybind11::array& to) { std::memcpy(to.mutable_data(), data_, size_ * sizeof(T)); }

  private:
    size_t size_;
    T* data_;
};

inline bool is_bf16(const std::string& format) {
    if (format != "bfloat16" && format != "float16") throw std::invalid_argument("format " + format);
    return format == "bfloat16";
}

void bind_probes(pybind11::module_& m);

}  // namespace simt
