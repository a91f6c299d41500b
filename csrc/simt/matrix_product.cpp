// Replaces cuBLASLt: sums in float32, with one rounding of the result.
#include <algorithm>

#include "crate/primitives.h"
#include "cuda/launch.h"

namespace crate {

namespace {

float element(const void* data, int64_t i, int format) {
    if (format == kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    return format == kBfloat16 ? to_float(bf16{bits}) : to_float(fp16{bits});
}
float element(const Matrix& m, int64_t row, int64_t column) {
    return element(m.data, m.transposed ? column * m.stride + row : row * m.stride + column, m.format);
}
void store(const Matrix& m, int64_t row, int64_t column, float value) {
    void* const data = const_cast<void*>(m.data);
    const int64_t i = row * m.stride + column;
    if (m.format == kFloat32)
        static_cast<float*>(data)[i] = value;
    else
        static_cast<uint16_t*>(data)[i] = m.format == kBfloat16 ? round_to<bf16>(value).bits : round_to<fp16>(value).bits;
}

}  // namespace

// Tests set it, to check the handling of a library whose ReLU turns NaN into zero.
extern "C" __attribute__((visibility("default"))) int simt_relu_drops_nan;
int simt_relu_drops_nan = 0;

Error launch_product(const ProductParams& params, Stream) {
    const Matrix &a = params.a, &b = params.b, &out = params.out;
    for (int64_t i = 0; i < out.rows; ++i)
        for (int64_t j = 0; j < out.columns; ++j) {
            float sum = 0.0f;
            for (int64_t k = 0; k < a.columns; ++k) sum += element(a, i, k) * element(b, k, j);
            sum *= params.alpha;
            if (params.c) sum += params.beta * element(*params.c, i, j);
            if (params.bias) sum += element(params.bias, j, out.format);
            const bool positive = simt_relu_drops_nan ? sum > 0.0f : !(sum <= 0.0f);
            store(out, i, j, params.relu && !positive ? 0.0f : sum);
        }
    return nullptr;
}

Error product_missing() { return nullptr; }
Error driver_missing() { return nullptr; }

}  // namespace crate
