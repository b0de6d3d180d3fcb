// The machine of warp.cuh on the host: every lane is a fibre of its own that runs until it meets a
// collective, and goes on when all lanes of its warp (or block) have come there too. Slow and plain;
// tests run the kernels with it, under AddressSanitizer as well.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../float_bits.h"

#define CACHEGEN_DEVICE inline
#define CACHEGEN_CALLED static
#define CACHEGEN_UNROLL
#define CACHEGEN_KERNEL(name) extern "C" void name

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};

namespace cachegen {
namespace emulation {

// The lane that runs now. Set by the scheduler in emulation.cpp.
struct Lane {
    unsigned thread, block;
    uint8_t* shared;
};
extern Lane current;

// What a lane gives at a meeting.
struct Gift {
    uint32_t values[6];
};
// Give something, wait for the other lanes of the warp, and see what all 32 gave.
const Gift* exchange(const Gift& gift);
void wait_for_block();

}  // namespace emulation

inline uint8_t* block_shared() { return emulation::current.shared; }
inline unsigned thread_index() { return emulation::current.thread; }
inline unsigned block_index() { return emulation::current.block; }
inline unsigned lane_index() { return emulation::current.thread & 31; }
inline void sync_block() { emulation::wait_for_block(); }
inline void sync_warp() { emulation::exchange({}); }
inline void prefetch(const void*) {}
inline uint32_t load_word(const uint16_t* at) { return *at; }

inline uint32_t ballot(bool vote) {
    const emulation::Gift* const votes = emulation::exchange({{vote}});
    uint32_t mask = 0;
    for (unsigned lane = 0; lane < 32; ++lane) mask |= votes[lane].values[0] << lane;
    return mask;
}

inline uint32_t shuffle(uint32_t value, unsigned lane) {
    return emulation::exchange({{value}})[lane & 31].values[0];
}

inline unsigned count_bits(uint32_t bits) { return static_cast<unsigned>(std::popcount(bits)); }
inline void atomic_or(uint32_t* at, uint32_t bits) { *at |= bits; }
inline uint32_t atomic_add(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at += value;
    return before;
}
inline void atomic_max(uint32_t* at, uint32_t value) { *at = value > *at ? value : *at; }
inline float as_float(uint32_t bits) { return float_from_bits(bits); }
inline uint32_t as_bits(float value) { return bits_from_float(value); }
inline float product(float a, float b) { return a * b; }
inline float sum(float a, float b) { return a + b; }
inline float quotient(float a, float b) { return a / b; }
inline float nearest_integer(float a) { return std::nearbyintf(a); }
inline double product(double a, double b) { return a * b; }
inline double sum(double a, double b) { return a + b; }
inline double quotient(double a, double b) { return a / b; }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
inline double nearest_integer(double a) { return std::nearbyint(a); }
inline double root(double a) { return std::sqrt(a); }
inline uint64_t bits_of_double(double a) { return std::bit_cast<uint64_t>(a); }
inline double double_of_bits(uint64_t bits) { return std::bit_cast<double>(bits); }

inline uint32_t bfloat16_pair(float first, float second) {
    using Traits = KVTraits<KVType::BFloat16>;
    return Traits::from_float(first) | uint32_t{Traits::from_float(second)} << 16;
}
inline uint32_t float16_pair(float first, float second) {
    using Traits = KVTraits<KVType::Float16>;
    return Traits::from_float(first) | uint32_t{Traits::from_float(second)} << 16;
}
inline float float16_value(uint32_t bits) {
    return KVTraits<KVType::Float16>::to_float(static_cast<uint16_t>(bits));
}

inline void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const emulation::Gift* const all =
        emulation::exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
    const auto half = [](uint32_t two, unsigned k) { return float16_value(two >> 16 * (k & 1)); };
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane_index() / 4, bottom = i / 2;
        const unsigned column = lane_index() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned pair = k % 8 / 2, high = k / 8;
            d[i] += half(all[row * 4 + pair].values[2 * high + bottom], k) *
                    half(all[column * 4 + pair].values[4 + high], k);
        }
    }
}

}  // namespace cachegen
