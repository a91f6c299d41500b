// The C interface of the library. Every function takes one structure of 8-byte fields, which Python packs.
//
// Pointers to absent tensors are null. Strides count elements. The last axis of every tensor is contiguous.
#pragma once

#include <cstdint>

namespace crate {

// Raise it, here and in ops/cpu_kernels, with every change of a structure or of what a field may hold.
constexpr int32_t kInterface = 2;

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A row-major matrix or a vector, with the type of its elements.
struct Array {
    const void* data;
    int64_t type;
    int64_t stride;  // between rows; unused for a vector
};

struct MutableArray {
    void* data;
    int64_t type;
    int64_t stride;
};

// The tokens of all heads. Element (b, i, h, c) is data[b * batch_stride + i * token_stride + h * head_stride + c].
struct Heads {
    void* data;  // written only if the field is an output
    int64_t type;
    int64_t batch_stride, token_stride, head_stride;
};

struct AttentionShape {
    int64_t batch, tokens, heads, width;
    const void* lengths;    // (batch,) int64 or null
    int64_t causal;
    double scale;
    int64_t low_precision;  // 1: products may round their operands to bfloat16
    int64_t first_query;    // cross-attention: tokens before it are only keys, and it (or `lengths`) ends the keys; else 0
};

struct AttentionForward {
    AttentionShape shape;
    Heads w, value, out;  // value.data null: the value is w; rows of `out` before the first query are not written
    float* lse;           // (batch, heads, tokens)
};

struct AttentionBackward {
    AttentionShape shape;
    Heads w, value, grad, out;
    const float* lse;
    Heads dw, dvalue;  // dvalue unused without a value
};

// LayerNorm before a matrix. Absent statistics are computed, and they are written if they are requested.
struct NormParameters {
    Array weight, bias;  // (d,)
    double eps;
};

struct PackedSize {
    int64_t depth, columns, low_precision;
};

// Parameters of a layer. A packed matrix contains the weight in the order of the product kernel, see Pack.
struct LayerWeights {
    NormParameters mssa_norm;
    Array projection;   // Uᵀ (heads * head width, d)
    Array output;       // (d, heads * head width); data null: identity
    Array output_bias;  // (d,); may be null
    NormParameters ista_norm;  // weight null: no norm, the step alone
    Array dictionary;   // W (d, d)
    Array folded;       // W - WᵀW (d, d) if known
    const void* packed_projection;  // prepared matrices, or null
    const void* packed_output;
    const void* packed_folded;
};

struct LayerShape {
    AttentionShape attention;
    int64_t width;  // d
    double mssa_step_size, step_size, lambd;
};

// Only the backward reads w, o, lse, middle and the statistics. They may be null: then they are not saved.
struct LayerForward {
    LayerShape shape;
    LayerWeights weights;
    int64_t halves;       // 1: attention, 2: ISTA, 3: both
    Array z;              // (rows, d)
    MutableArray w, o;    // (rows, heads * head width)
    float* lse;
    MutableArray middle;  // the tokens between the halves, (rows, d)
    MutableArray out;     // (rows, d)
    float *mean_1, *rstd_1, *mean_2, *rstd_2;  // (rows,), of the first and the second norm
};

// Gradients whose data is null are not computed.
struct LayerBackward {
    LayerShape shape;
    LayerWeights weights;
    int64_t halves;
    Array grad, out;  // (rows, d), of the result
    Array z, w, o;
    const float* lse;
    Array middle;     // z if only the ISTA half runs
    const float *mean_1, *rstd_1, *mean_2, *rstd_2;
    MutableArray dz;
    MutableArray dmssa_norm_weight, dmssa_norm_bias, dprojection, doutput, doutput_bias;
    MutableArray dista_norm_weight, dista_norm_bias, ddictionary;
};

struct OvercompleteForward {
    int64_t rows, width, atoms;
    double step_size, lambd;
    int64_t low_precision;
    Array x, dictionary, decoder;  // D, D1: (d, m)
    MutableArray first, second;    // the codes z1, z2 (rows, m)
    MutableArray out;              // (rows, d)
};

struct OvercompleteBackward {
    int64_t rows, width, atoms;
    double step_size;
    int64_t low_precision;
    Array grad, x, dictionary, decoder, first, second;
    MutableArray dx, ddictionary, ddecoder;
};

struct Pack {  // a weight in the order of the product kernel
    Array matrix;
    int64_t transposed;  // 0: (depth, columns) as stored, 1: stored as (columns, depth)
    int64_t depth, columns, low_precision;
    void* out;
};

struct Fold {  // W - WᵀW
    int64_t width, low_precision;
    Array dictionary;
    MutableArray out;
};

typedef void (*RangeFunction)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, RangeFunction, void* context);
typedef int32_t (*GetNumThreads)(uint32_t*);

// The functions of one instruction set's translation unit.
struct Kernels {
    const char* name;
    int64_t (*packed_bytes)(const PackedSize&);
    void (*pack)(const Pack&);
    void (*fold)(const Fold&);
    void (*attention_forward)(const AttentionForward&);
    void (*attention_backward)(const AttentionBackward&);
    void (*layer_forward)(const LayerForward&);
    void (*layer_backward)(const LayerBackward&);
    void (*overcomplete_forward)(const OvercompleteForward&);
    void (*overcomplete_backward)(const OvercompleteBackward&);
};

extern ParallelFor parallel_for_of_torch;
extern GetNumThreads num_threads_of_torch;

}  // namespace crate
