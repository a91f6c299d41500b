// The interface of the library: the choice of the instruction set, and the C functions that Python calls.
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "interface.h"

namespace crate {

ParallelFor parallel_for_of_torch = nullptr;
GetNumThreads num_threads_of_torch = nullptr;

// The build lists the compiled instruction sets, slowest first: -DCRATE_ISAS="CRATE_EACH(avx2) CRATE_EACH(avx512)".
#define CRATE_EACH(isa)           \
    namespace isa {               \
    extern const Kernels kernels; \
    }
CRATE_ISAS
#undef CRATE_EACH
#define CRATE_EACH(isa) &isa::kernels,
static const Kernels* const kBuilt[] = {CRATE_ISAS};
#undef CRATE_EACH

// The operating system must grant a process the tile registers before their first use.
static bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

static bool runs_here(const char* isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!std::strcmp(isa, "avx2")) return avx2;
    if (!std::strcmp(isa, "avx512")) return avx512;
    unsigned eax, ebx, ecx, edx;
    const auto leaf = [&](unsigned number, unsigned sub) {
        __asm__ volatile("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(number), "c"(sub));
    };
    leaf(7, 1);
    const bool bf16 = avx512 && (eax >> 5 & 1);
    if (!std::strcmp(isa, "avx512_bf16")) return bf16;
    leaf(7, 0);
    const bool amx = (edx >> 22 & 1) && (edx >> 24 & 1);
    if (!std::strcmp(isa, "amx")) return bf16 && amx && tiles_granted();
    return false;
#else
    return true;  // built only for this family of processors
#endif
}

static const Kernels* chosen = nullptr;
static thread_local std::string error;

template <class Call>
static int32_t guarded(void (*const Kernels::*function)(const Call&), const Call* call) {
    try {
        (chosen->*function)(*call);
        return 0;
    } catch (const std::exception& e) {
        error = e.what();
    } catch (...) {
        error = "unknown error";
    }
    return 1;
}

}  // namespace crate

using namespace crate;

extern "C" {

// Chooses the fastest built set that this processor runs, or `isa` if given. Returns its name; null if there is none.
__attribute__((visibility("default"))) const char* crate_cpu_open(ParallelFor parallel, GetNumThreads threads,
                                                                  const char* isa) {
    parallel_for_of_torch = parallel;
    num_threads_of_torch = threads;
    const Kernels* found = nullptr;
    for (const Kernels* k : kBuilt)
        if ((isa == nullptr || !*isa || !std::strcmp(isa, k->name)) && runs_here(k->name)) found = k;
    if (found != nullptr) chosen = found;
    return found == nullptr ? nullptr : found->name;
}

// The names of all built sets, slowest first, separated by spaces. `runnable`: only those that this processor runs.
__attribute__((visibility("default"))) const char* crate_cpu_built(int32_t runnable) {
    static thread_local std::string names;
    names.clear();
    for (const Kernels* k : kBuilt)
        if (!runnable || runs_here(k->name)) names += (names.empty() ? "" : " ") + std::string(k->name);
    return names.c_str();
}

__attribute__((visibility("default"))) int32_t crate_cpu_interface() { return kInterface; }

__attribute__((visibility("default"))) const char* crate_cpu_error() { return error.c_str(); }

__attribute__((visibility("default"))) int64_t crate_cpu_packed_bytes(const PackedSize* size) {
    return chosen->packed_bytes(*size);
}

// For each function, the function and the size of its structure. Python compares the size with its own before the first
// call.
#define CRATE_FUNCTION(name, Call)                                                                            \
    __attribute__((visibility("default"))) int32_t crate_cpu_##name(const Call* call) {                       \
        return guarded(&Kernels::name, call);                                                                 \
    }                                                                                                         \
    __attribute__((visibility("default"))) int64_t crate_cpu_##name##_bytes() { return int64_t(sizeof(Call)); }
CRATE_FUNCTION(pack, Pack)
CRATE_FUNCTION(fold, Fold)
CRATE_FUNCTION(attention_forward, AttentionForward)
CRATE_FUNCTION(attention_backward, AttentionBackward)
CRATE_FUNCTION(layer_forward, LayerForward)
CRATE_FUNCTION(layer_backward, LayerBackward)
CRATE_FUNCTION(overcomplete_forward, OvercompleteForward)
CRATE_FUNCTION(overcomplete_backward, OvercompleteBackward)
}
