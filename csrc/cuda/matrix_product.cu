// Matrix products through cuBLASLt, with the epilogue of an ISTA step: relu(alpha a b + beta c + bias).
//
// cuBLASLt is column-major, so a row-major matrix is its own transpose there. The library therefore computes outᵀ = bᵀ
// aᵀ: b comes first. The bias, one element per column of out, is one per row of outᵀ, and the epilogue adds it.
//
// The build needs only cuBLASLt's header. The first product opens the library. A torch built with CUDA has loaded it by
// then. A process without the library still has the other kernels.
#include "cuda/launch.cuh"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

namespace crate {

namespace {

#define CRATE_STRING_OF(x) #x
#define CRATE_STRING(x) CRATE_STRING_OF(x)

// The functions of the library. `missing` is the reason why they are not available.
struct Blas {
    std::string missing;
#define CRATE_CUBLASLT_FUNCTIONS(each)                                                                                    \
    each(Create) each(GetStatusString) each(Matmul) each(MatmulAlgoGetHeuristic) each(MatmulDescCreate)                   \
    each(MatmulDescDestroy) each(MatmulDescSetAttribute) each(MatmulPreferenceCreate) each(MatmulPreferenceDestroy)       \
    each(MatmulPreferenceSetAttribute) each(MatrixLayoutCreate) each(MatrixLayoutDestroy)
#define CRATE_DECLARE(name) decltype(&::cublasLt##name) name = nullptr;
    CRATE_CUBLASLT_FUNCTIONS(CRATE_DECLARE)

    Blas() {
        const char* const file = "libcublasLt.so." CRATE_STRING(CUBLAS_VER_MAJOR);
        void* const library = dlopen(file, RTLD_LAZY | RTLD_LOCAL);
        if (library == nullptr) {
            missing = std::string(file) + " does not load: " + dlerror();
            return;
        }
#define CRATE_FIND(name)                                                             \
    name = reinterpret_cast<decltype(name)>(dlsym(library, "cublasLt" #name));       \
    if (name == nullptr) missing = std::string(file) + " has no function cublasLt" #name;
        CRATE_CUBLASLT_FUNCTIONS(CRATE_FIND)
    }
};

const Blas& blas() {
    static const Blas instance;
    return instance;
}

struct Destroy {
    void operator()(cublasLtMatmulDesc_t d) const { blas().MatmulDescDestroy(d); }
    void operator()(cublasLtMatrixLayout_t d) const { blas().MatrixLayoutDestroy(d); }
    void operator()(cublasLtMatmulPreference_t d) const { blas().MatmulPreferenceDestroy(d); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

struct Failure {
    cublasStatus_t status;
};
void check(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) throw Failure{status};
}

cudaDataType_t type(int format) {
    return format == kBfloat16 ? CUDA_R_16BF : format == kFloat16 ? CUDA_R_16F : CUDA_R_32F;
}

Owned<cublasLtMatrixLayout_t> layout(const Matrix& m) {
    cublasLtMatrixLayout_t handle;
    check(blas().MatrixLayoutCreate(&handle, type(m.format), m.transposed ? m.rows : m.columns,
                                    m.transposed ? m.columns : m.rows, m.stride));
    return Owned<cublasLtMatrixLayout_t>(handle);
}

int alignment(const void* p) {
    int bytes = 256;
    while (reinterpret_cast<uintptr_t>(p) % bytes) bytes /= 2;
    return bytes;
}

template <class T>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(blas().MatmulDescSetAttribute(operation, attribute, &value, sizeof(T)));
}
template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check(blas().MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(T)));
}

// A product in the form that cuBLASLt needs.
struct Problem {
    Owned<cublasLtMatmulDesc_t> operation;
    Owned<cublasLtMatrixLayout_t> a, b, c, out;
    int alignment_a, alignment_b, alignment_c, alignment_out;
    int64_t workspace_bytes;
};

// The first algorithm of the library's heuristic. Sums of a split depth must stay in the accumulator's precision and be
// added in a fixed order, so that results are repeatable. If no such algorithm is left for a shape, any algorithm is
// taken.
cublasLtMatmulAlgo_t choose(cublasLtHandle_t handle, const Problem& problem) {
    cublasLtMatmulPreference_t raw;
    check(blas().MatmulPreferenceCreate(&raw));
    const Owned<cublasLtMatmulPreference_t> preference(raw);
    set(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(problem.workspace_bytes));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(problem.alignment_b));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(problem.alignment_a));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(problem.alignment_c));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(problem.alignment_out));
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
    for (const uint32_t reductions : {uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE), uint32_t(CUBLASLT_REDUCTION_SCHEME_MASK)}) {
        set(raw, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
        cublasLtMatmulHeuristicResult_t found;
        int count = 0;
        status = blas().MatmulAlgoGetHeuristic(handle, problem.operation.get(), problem.b.get(), problem.a.get(),
                                               problem.c.get(), problem.out.get(), raw, 1, &found, &count);
        if (status == CUBLAS_STATUS_SUCCESS && count > 0) return found.algo;
    }
    throw Failure{status == CUBLAS_STATUS_SUCCESS ? CUBLAS_STATUS_NOT_SUPPORTED : status};
}

// Everything on which the choice of an algorithm depends.
using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, int, int, int, int, int,
                       int, int, int64_t>;
// Otherwise sequences of ever new lengths would fill the memory.
constexpr size_t kMostAlgorithms = 4096;

struct Cache {
    std::mutex mutex;
    std::map<int, cublasLtHandle_t> handles;  // by device; they live as long as the process
    std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};

void product(const ProductParams& params, cudaStream_t stream) {
    const Matrix &a = params.a, &b = params.b, &out = params.out, &source = params.c ? *params.c : out;
    cublasLtMatmulDesc_t raw;
    check(blas().MatmulDescCreate(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const Problem problem{Owned<cublasLtMatmulDesc_t>(raw), layout(a), layout(b), layout(source), layout(out),
                          alignment(a.data), alignment(b.data), alignment(source.data), alignment(out.data),
                          params.workspace_bytes};
    set(raw, CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(raw, CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    const cublasLtEpilogue_t epilogue = params.bias ? (params.relu ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_BIAS)
                                                    : (params.relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT);
    set(raw, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (params.bias) {
        set(raw, CUBLASLT_MATMUL_DESC_BIAS_POINTER, params.bias);
        set(raw, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type(out.format));
    }

    static Cache& cache = *new Cache;
    cublasLtHandle_t handle;
    cublasLtMatmulAlgo_t algorithm;
    {
        const Key key{params.device, out.rows, out.columns, a.columns, a.stride, b.stride, source.stride, out.stride,
                      a.transposed, b.transposed, a.format, out.format, int(epilogue), problem.alignment_a,
                      problem.alignment_b, problem.alignment_c, problem.alignment_out, params.workspace_bytes};
        const std::lock_guard lock(cache.mutex);
        cublasLtHandle_t& known_handle = cache.handles[params.device];
        if (!known_handle) check(blas().Create(&known_handle));
        handle = known_handle;
        auto known = cache.algorithms.find(key);
        if (known == cache.algorithms.end()) {
            if (cache.algorithms.size() >= kMostAlgorithms) cache.algorithms.clear();
            known = cache.algorithms.emplace(key, choose(handle, problem)).first;
        }
        algorithm = known->second;
    }
    check(blas().Matmul(handle, raw, &params.alpha, b.data, problem.b.get(), a.data, problem.a.get(), &params.beta, source.data,
                        problem.c.get(), const_cast<void*>(out.data), problem.out.get(), &algorithm, params.workspace,
                        size_t(params.workspace_bytes), stream));
}

}  // namespace

Error launch_product(const ProductParams& params, Stream stream) {
    if (Error missing = product_missing()) return missing;
    try {
        product(params, cudaStream_t(stream));
    } catch (const Failure& failure) {
        return blas().GetStatusString(failure.status);
    }
    return nullptr;
}

Error product_missing() { return blas().missing.empty() ? nullptr : blas().missing.c_str(); }

}  // namespace crate

#else

namespace crate {

Error product_missing() { return "cublasLt.h was not there when the CUDA library was built"; }
Error launch_product(const ProductParams&, Stream) { return product_missing(); }

}  // namespace crate

#endif
