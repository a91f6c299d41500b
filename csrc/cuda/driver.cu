#include "cuda/launch.cuh"

namespace crate {

Error driver_missing() {
    int driver = 0;
    if (const cudaError_t error = cudaDriverGetVersion(&driver)) return text(error);
    if (driver == 0) return "there is no CUDA driver";
    return driver / 1000 >= CUDART_VERSION / 1000 ? nullptr : "the driver is older than the CUDA that the library was built with";
}

}  // namespace crate
