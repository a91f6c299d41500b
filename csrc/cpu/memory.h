// Conversion of rows between any element type and floats, and scratch memory that a thread keeps between calls.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "interface.h"
#include "vector.h"

namespace crate::CRATE_ISA {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t bytes_of(int64_t type) { return type == kFloat32 ? 4 : 2; }

// -- conversions ---------------------------------------------------------------------------------------------------

inline Ints widen(const uint16_t* p) {
    return __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Ints) & 0xffff;
}

inline Floats from_bfloat16(Ints h) { return as_floats(h << 16); }

inline Ints to_bfloat16(Floats x) {  // to nearest, ties to even; NaN stays NaN
    const Ints u = as_ints(x);
    const Ints rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (x == x ? rounded : (u >> 16) | 0x40) & 0xffff;
}

inline Floats from_float16(Ints h) {
    const Ints magnitude = (h & 0x7fff) << 13;
    const Floats value = as_floats(magnitude) * broadcast(0x1p112f);  // also right for subnormal halves
    const Ints bits = magnitude >= (31 << 23) ? magnitude | (255 << 23) : as_ints(value);
    return as_floats(bits | ((h & 0x8000) << 16));
}

inline Ints to_float16(Floats x) {
    const Ints u = as_ints(x), magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
    const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 aligns the bits of a subnormal half with the end of the float's mantissa, rounded to even.
    const Ints subnormal = as_ints(as_floats(magnitude) + broadcast(0.5f)) - as_ints(broadcast(0.5f));
    Ints half = magnitude < (113 << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? broadcast(0x7c00) : half;  // 65520 and above
    half = magnitude > 0x7f800000 ? broadcast(0x7e00) : half;   // NaN
    return half | sign;
}

template <int64_t kType>
inline Floats load_as(const void* p, int64_t i) {
    if constexpr (kType == kFloat32) return load(static_cast<const float*>(p) + i);
    const Ints h = widen(static_cast<const uint16_t*>(p) + i);
    return kType == kBfloat16 ? from_bfloat16(h) : from_float16(h);
}

template <int64_t kType>
inline void store_as(void* p, int64_t i, Floats x) {
    if constexpr (kType == kFloat32) {
        store(static_cast<float*>(p) + i, x);
#if defined(__AVX512BF16__)
    } else if constexpr (kType == kBfloat16) {
        *reinterpret_cast<LooseHalves*>(static_cast<uint16_t*>(p) + i) = (LooseHalves)_mm512_cvtneps_pbh((__m512)x);
#endif
    } else {
        const Ints h = kType == kBfloat16 ? to_bfloat16(x) : to_float16(x);
        *reinterpret_cast<LooseHalves*>(static_cast<uint16_t*>(p) + i) = __builtin_convertvector(h, LooseHalves);
    }
}

// Calls f with the type as a constant.
template <class F>
inline void with_type(int64_t type, F f) {
    if (type == kFloat32) f(std::integral_constant<int64_t, kFloat32>());
    else if (type == kBfloat16) f(std::integral_constant<int64_t, kBfloat16>());
    else f(std::integral_constant<int64_t, kFloat16>());
}

__attribute__((noinline)) inline void read_any(const void* data, int64_t type, int64_t first, int64_t count, float* out) {
    with_type(type, [&](auto kType) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(out + i, load_as<kType>(data, first + i));
        if (i < count) {
            alignas(64) char last[kVectorBytes] = {};
            std::memcpy(last, static_cast<const char*>(data) + (first + i) * bytes_of(kType),
                        (count - i) * bytes_of(kType));
            store(out + i, load_as<kType>(last, 0));
        }
    });
}

// `count` elements, beginning with `first`, as floats. The whole last vector of `out` is written, with zeros at its
// end.
inline void read(const void* data, int64_t type, int64_t first, int64_t count, float* out) {
    if (type != kFloat32) return read_any(data, type, first, count, out);
    const float* from = static_cast<const float*>(data) + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
    if (i < count) store(out + i, load_first(from + i, int(count - i)));
}

__attribute__((noinline)) inline void write_any(void* data, int64_t type, int64_t first, int64_t count, const float* values) {
    with_type(type, [&](auto kType) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store_as<kType>(data, first + i, load(values + i));
        if (i < count) {
            alignas(64) char last[kVectorBytes];
            store_as<kType>(last, 0, load(values + i));
            std::memcpy(static_cast<char*>(data) + (first + i) * bytes_of(kType), last, (count - i) * bytes_of(kType));
        }
    });
}

// The first `count` of `values`, whose last vector must be whole.
inline void write(void* data, int64_t type, int64_t first, int64_t count, const float* values) {
    if (type != kFloat32) return write_any(data, type, first, count, values);
    float* to = static_cast<float*>(data) + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(values + i));
    if (i < count) store_first(to + i, load(values + i), int(count - i));
}

// -- scratch -------------------------------------------------------------------------------------------------------

// Memory of one thread, allocated in order and freed when a Frame ends. Blocks never move while they are in use.
class Scratch {
  public:
    static Scratch& of_this_thread() {
        static thread_local Scratch scratch;
        return scratch;
    }
    ~Scratch() { clear(); }

    void* take(size_t bytes) {
        bytes = (bytes + 63 + 64) / 64 * 64;  // one more cache line, so that a read of a whole vector at the end stays inside
        while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) ++block_, used_ = 0;
        if (block_ == blocks_.size()) {
            const size_t size = bytes > kSmallest ? bytes : kSmallest;
            void* memory = std::aligned_alloc(64, (size + 63) / 64 * 64);
            if (memory == nullptr) throw std::bad_alloc();
            blocks_.push_back({static_cast<char*>(memory), size});
            used_ = 0;
        }
        void* p = blocks_[block_].data + used_;
        used_ += bytes;
        return p;
    }

  private:
    friend class Frame;
    struct Block {
        char* data;
        size_t size;
    };
    static constexpr size_t kSmallest = size_t(1) << 20, kKept = size_t(64) << 20;

    void clear() {
        for (const Block& b : blocks_) std::free(b.data);
        blocks_.clear();
        block_ = used_ = 0;
    }

    std::vector<Block> blocks_;
    size_t block_ = 0, used_ = 0;
};

class Frame {
  public:
    Frame() : scratch_(Scratch::of_this_thread()), block_(scratch_.block_), used_(scratch_.used_) {}
    ~Frame() {
        scratch_.block_ = block_;
        scratch_.used_ = used_;
        if (block_ == 0 && used_ == 0) {  // the outermost frame: free the memory of one large call
            size_t total = 0;
            for (const Scratch::Block& b : scratch_.blocks_) total += b.size;
            if (total > Scratch::kKept) scratch_.clear();
        }
    }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

    template <class T = float>
    T* take(int64_t count) {
        return static_cast<T*>(scratch_.take(size_t(count) * sizeof(T)));
    }

  private:
    Scratch& scratch_;
    size_t block_, used_;
};

// -- threads -------------------------------------------------------------------------------------------------------

// Calls f(begin, end) on torch's threads until [0, count) is covered. The result does not depend on which thread runs
// what.
template <class F>
inline void parallel(int64_t count, F f) {
    if (count <= 0) return;
    if (count == 1 || parallel_for_of_torch == nullptr) {
        f(int64_t(0), count);
        return;
    }
    parallel_for_of_torch(
        0, count, 1, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f);
}

}  // namespace crate::CRATE_ISA
