// Two ISTA steps with an overcomplete dictionary D (d, m), and the decoder D1 (d, m):
//   z1 = relu(eta x D - eta lambda),  z2 = relu(z1 - eta t D - eta lambda) with t = z1 Dᵀ - x,  out = z2 D1ᵀ.
#pragma once

#include "layer.h"

namespace crate::CRATE_ISA {

template <bool kPairs>
inline const float* pack(Frame& frame, const Source& s, bool transposed, int64_t depth, int64_t columns) {
    float* packed = frame.take(packed_floats<kPairs>(depth, columns));
    pack_matrix<kPairs>(s, transposed, 0, depth, columns, packed);
    return packed;
}

// A float matrix (rows, columns) of scratch memory, with whole vectors per row.
inline MutableArray scratch_matrix(Frame& frame, int64_t rows, int64_t columns) {
    const int64_t stride = round_up(columns, kLanes);
    return {frame.take(rows * stride), kFloat32, stride};
}

inline Array read_only(const MutableArray& a) { return {a.data, a.type, a.stride}; }

inline void overcomplete_forward(const OvercompleteForward& call) {
    with_engine(call.low_precision, [&](auto pairs) {
        constexpr bool kPairs = decltype(pairs)::value;
        const int64_t rows = call.rows, d = call.width, m = call.atoms;
        if (rows == 0) return;
        Frame frame;
        const float eta = float(call.step_size), shift = float(call.step_size * call.lambd);
        const float* analysis = pack<kPairs>(frame, call.dictionary, false, d, m);
        const float* synthesis = pack<kPairs>(frame, call.dictionary, true, m, d);
        const float* decoder = pack<kPairs>(frame, call.decoder, true, m, d);
        const MutableArray rest = scratch_matrix(frame, rows, d);
        Finish first, difference, second, out;
        first.out = call.first, first.alpha = eta, first.shift = shift, first.relu = true;
        multiply<kPairs>(call.x, analysis, rows, d, m, first);
        difference.out = rest, difference.alpha = -1.0f, difference.residual = call.x;  // x - z1 Dᵀ
        multiply<kPairs>(call.first, synthesis, rows, m, d, difference);
        second.out = call.second, second.alpha = eta, second.shift = shift, second.relu = true;
        second.residual = call.first;
        multiply<kPairs>(rest, analysis, rows, d, m, second);
        out.out = call.out;
        multiply<kPairs>(call.second, decoder, rows, m, d, out);
    });
}

inline void overcomplete_backward(const OvercompleteBackward& call) {
    with_engine(call.low_precision, [&](auto pairs) {
        constexpr bool kPairs = decltype(pairs)::value;
        const int64_t rows = call.rows, d = call.width, m = call.atoms;
        const float eta = float(call.step_size);
        Frame frame;
        const float* analysis = pack<kPairs>(frame, call.dictionary, false, d, m);
        const float* synthesis = pack<kPairs>(frame, call.dictionary, true, m, d);
        const float* decoder = pack<kPairs>(frame, call.decoder, false, d, m);
        const MutableArray rest = scratch_matrix(frame, rows, d);   // -t = x - z1 Dᵀ
        const MutableArray upper = scratch_matrix(frame, rows, m);  // g2: the gradient of z2 before its ReLU
        const MutableArray inner = scratch_matrix(frame, rows, d);  // eta g2 Dᵀ, the gradient of -t
        const MutableArray lower = scratch_matrix(frame, rows, m);  // the gradient of z1
        Finish f;
        f.out = rest, f.alpha = -1.0f, f.residual = call.x;
        multiply<kPairs>(call.first, synthesis, rows, m, d, f);
        f = Finish();
        f.out = upper;
        multiply<kPairs>(call.grad, decoder, rows, d, m, f);
        const Source g2 = Source(upper).gated(call.second), g1 = Source(lower).gated(call.first);
        f = Finish();
        f.out = inner, f.alpha = eta;
        multiply<kPairs>(g2, synthesis, rows, m, d, f);
        f = Finish();
        f.out = lower, f.alpha = -1.0f, f.residual = g2;  // g2 - inner D
        multiply<kPairs>(inner, analysis, rows, d, m, f);
        f = Finish();
        f.out = call.dx, f.alpha = eta, f.residual = inner;  // inner + eta g1 Dᵀ
        multiply<kPairs>(g1, synthesis, rows, m, d, f);

        // dD = eta (x - z1 Dᵀ)ᵀ g2 - innerᵀ z1 + eta xᵀ g1
        Frame sums;
        const MutableArray a = scratch_matrix(sums, d, m), b = scratch_matrix(sums, d, m), c = scratch_matrix(sums, d, m);
        multiply_transposed_into<kPairs>(rest, g2, d, rows, m, eta, a);
        multiply_transposed_into<kPairs>(inner, call.first, d, rows, m, -1.0f, b);
        multiply_transposed_into<kPairs>(call.x, g1, d, rows, m, eta, c);
        float* total = static_cast<float*>(a.data);
        for (int64_t i = 0; i < d * a.stride; i += kLanes)
            store(total + i, load(total + i) + load(static_cast<float*>(b.data) + i) + load(static_cast<float*>(c.data) + i));
        write_matrix(call.ddictionary, total, a.stride, d, m);
        multiply_transposed_into<kPairs>(call.grad, call.second, d, rows, m, 1.0f, call.ddecoder);
    });
}

}  // namespace crate::CRATE_ISA
