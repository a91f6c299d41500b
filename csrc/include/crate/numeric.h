// The two 16-bit number formats, as storage. Arithmetic is always fp32; `pack` and `unpack` in primitives.h convert.
#pragma once

#include <cstdint>
#include <limits>

namespace crate {

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

// 16 bytes, the widest access of one thread: eight 16-bit elements.
struct alignas(16) Chunk {
    uint32_t word[4];
};

struct alignas(8) Float2 {
    float x, y;
};

// Numbers of the element formats in the C interface.
enum Format { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

constexpr int kChunkElements = 8;
constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace crate
