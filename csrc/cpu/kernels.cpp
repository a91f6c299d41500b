// The kernels for one instruction set. The build compiles this file once for each set, with CRATE_ISA as its name.
#include "overcomplete.h"

namespace crate::CRATE_ISA {

static int64_t packed_bytes(const PackedSize& size) {
    int64_t floats = 0;
    with_engine(size.low_precision, [&](auto pairs) { floats = packed_floats<decltype(pairs)::value>(size.depth, size.columns); });
    return 4 * floats;
}

static void pack_weight(const Pack& call) {
    with_engine(call.low_precision, [&](auto pairs) {
        pack_matrix<decltype(pairs)::value>(call.matrix, call.transposed, 0, call.depth, call.columns,
                                            static_cast<float*>(call.out));
    });
}

static void fold(const Fold& call) {
    with_engine(call.low_precision, [&](auto pairs) {
        Frame frame;
        int64_t stride;
        float* values = float_matrix(frame, call.out, call.width, call.width, &stride);
        fold_dictionary<decltype(pairs)::value>(call.dictionary, call.width, values, stride);
        write_matrix(call.out, values, stride, call.width, call.width);
    });
}

#define CRATE_TEXT(x) #x
#define CRATE_NAME(x) CRATE_TEXT(x)
extern const Kernels kernels;
const Kernels kernels = {CRATE_NAME(CRATE_ISA), packed_bytes,       pack_weight,          fold,
                         attention_forward,     attention_backward, layer_forward,        layer_backward,
                         overcomplete_forward,  overcomplete_backward};

}  // namespace crate::CRATE_ISA
