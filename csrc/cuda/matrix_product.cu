// Matrix products through cuBLASLt, with the epilogue of an ISTA step: relu(alpha a b + beta c + bias).
//
// cuBLASLt is column-major. A row-major matrix is its own transpose there, so outᵀ = bᵀ aᵀ is what is asked of it: b
// comes first, and the bias, one element a column of out, is one a row of outᵀ, which is what its epilogue adds.
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "cuda/launch.h"

namespace crate {

namespace {

struct Destroy {
    void operator()(cublasLtMatmulDesc_t d) const { cublasLtMatmulDescDestroy(d); }
    void operator()(cublasLtMatrixLayout_t d) const { cublasLtMatrixLayoutDestroy(d); }
    void operator()(cublasLtMatmulPreference_t d) const { cublasLtMatmulPreferenceDestroy(d); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

struct Failure {
    cublasStatus_t status;
};
void check(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) throw Failure{status};
}

Owned<cublasLtMatrixLayout_t> layout(const Matrix& m) {
    cublasLtMatrixLayout_t handle;
    check(cublasLtMatrixLayoutCreate(&handle, m.type, m.transposed ? m.rows : m.columns, m.transposed ? m.columns : m.rows,
                                     m.stride));
    return Owned<cublasLtMatrixLayout_t>(handle);
}

int alignment(const void* p) {
    int bytes = 256;
    while (reinterpret_cast<uintptr_t>(p) % bytes) bytes /= 2;
    return bytes;
}

// Everything the choice of an algorithm depends on.
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, int, int, int, int, int,
                       int, int, size_t>;

struct Library {
    std::mutex mutex;
    std::map<int, cublasLtHandle_t> handles;  // by device; kept for the life of the process
    std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};

Library& library() {
    static auto* instance = new Library;
    return *instance;
}

template <class T>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(T)));
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(T)));
}

void product(const Matrix& a, const Matrix& b, const Matrix* c, const void* bias, const Matrix& out, float alpha, float beta,
             bool relu, void* workspace, size_t workspace_bytes, int device, cudaStream_t stream) {
    cublasLtMatmulDesc_t raw_operation;
    check(cublasLtMatmulDescCreate(&raw_operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const Owned<cublasLtMatmulDesc_t> operation(raw_operation);
    set(operation.get(), CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(operation.get(), CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    const cublasLtEpilogue_t epilogue = bias ? (relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS)
                                             : (relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT);
    set(operation.get(), CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (bias) {
        set(operation.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        set(operation.get(), CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, out.type);
    }
    const Matrix& source = c ? *c : out;
    const auto layout_a = layout(a), layout_b = layout(b), layout_c = layout(source), layout_out = layout(out);

    Library& lib = library();
    std::lock_guard lock(lib.mutex);
    cublasLtHandle_t& handle = lib.handles[device];
    if (!handle) check(cublasLtCreate(&handle));

    const Key key{device, out.rows, out.columns, a.columns, a.stride, b.stride, source.stride, out.stride, a.transposed,
                  b.transposed, int(a.type), int(out.type), int(epilogue), alignment(a.data), alignment(b.data),
                  alignment(source.data), alignment(out.data), workspace_bytes};
    auto known = lib.algorithms.find(key);
    if (known == lib.algorithms.end()) {
        cublasLtMatmulPreference_t raw_preference;
        check(cublasLtMatmulPreferenceCreate(&raw_preference));
        const Owned<cublasLtMatmulPreference_t> preference(raw_preference);
        set(preference.get(), CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace_bytes));
        set(preference.get(), CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(alignment(b.data)));
        set(preference.get(), CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(alignment(a.data)));
        set(preference.get(), CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(alignment(source.data)));
        set(preference.get(), CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(alignment(out.data)));
        // Split-K sums stay in the accumulator's precision, in the workspace, and are added in a fixed order.
        set(preference.get(), CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        cublasLtMatmulHeuristicResult_t found;
        int count = 0;
        check(cublasLtMatmulAlgoGetHeuristic(handle, operation.get(), layout_b.get(), layout_a.get(), layout_c.get(),
                                             layout_out.get(), preference.get(), 1, &found, &count));
        if (count == 0) throw Failure{CUBLAS_STATUS_NOT_SUPPORTED};
        known = lib.algorithms.emplace(key, found.algo).first;
    }
    check(cublasLtMatmul(handle, operation.get(), &alpha, b.data, layout_b.get(), a.data, layout_a.get(), &beta, source.data,
                         layout_c.get(), const_cast<void*>(out.data), layout_out.get(), &known->second, workspace,
                         workspace_bytes, stream));
}

}  // namespace

cublasStatus_t matrix_product(const Matrix& a, const Matrix& b, const Matrix* c, const void* bias, const Matrix& out,
                              float alpha, float beta, bool relu, void* workspace, size_t workspace_bytes, int device,
                              cudaStream_t stream) {
    try {
        product(a, b, c, bias, out, alpha, beta, relu, workspace, workspace_bytes, device, stream);
    } catch (const Failure& failure) {
        return failure.status;
    }
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace crate
