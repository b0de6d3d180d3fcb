// What the kernels need of the machine, once for CUDA, HIP and the emulation on the host: integer
// types, the lane, votes, shuffles, conversions and the matrix product of a warp. A warp has 32
// lanes everywhere; all collectives are called by all 32.
#pragma once

#if defined(CACHEGEN_EMULATION)
#include "emulation.h"
#else

// Compilers at run time have no standard library.
#if defined(__CUDACC_RTC__) || defined(__HIPCC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#define CACHEGEN_DEVICE __device__ __forceinline__
// Tests that only ask whether a compiler takes the source define CACHEGEN_SMALL.
#if defined(CACHEGEN_SMALL)
#define CACHEGEN_UNROLL _Pragma("unroll 1")
#else
#define CACHEGEN_UNROLL _Pragma("unroll")
#endif
// Once in the program, called: for what runs rarely enough and is large.
#define CACHEGEN_CALLED static __device__ __noinline__
#define CACHEGEN_KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name

namespace cachegen {

// Dynamic shared memory of the block, 16-byte aligned.
extern __shared__ uint4 shared_memory[];
CACHEGEN_DEVICE uint8_t* block_shared() { return reinterpret_cast<uint8_t*>(shared_memory); }

CACHEGEN_DEVICE unsigned thread_index() { return threadIdx.x; }
CACHEGEN_DEVICE unsigned block_index() { return blockIdx.x; }
CACHEGEN_DEVICE unsigned lane_index() { return threadIdx.x & 31; }
CACHEGEN_DEVICE void sync_block() { __syncthreads(); }

#if defined(__HIP_PLATFORM_AMD__)
// Wavefronts of 64 hold two warps.
CACHEGEN_DEVICE uint32_t ballot(bool vote) {
    return static_cast<uint32_t>(__ballot(vote) >> (__lane_id() & 32));
}
CACHEGEN_DEVICE uint32_t shuffle(uint32_t value, unsigned lane) {
    return __shfl(static_cast<int>(value), static_cast<int>(lane), 32);
}
CACHEGEN_DEVICE void sync_warp() { __threadfence_block(); }
CACHEGEN_DEVICE void prefetch(const void*) {}
CACHEGEN_DEVICE uint32_t load_word(const uint16_t* at) { return *at; }
#else
CACHEGEN_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
CACHEGEN_DEVICE uint32_t shuffle(uint32_t value, unsigned lane) {
    return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
}
CACHEGEN_DEVICE void sync_warp() { __syncwarp(); }
CACHEGEN_DEVICE void prefetch(const void* at) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
}
// Of memory that no kernel writes.
CACHEGEN_DEVICE uint32_t load_word(const uint16_t* at) {
    uint16_t word;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(word) : "l"(at));
    return word;
}
#endif

CACHEGEN_DEVICE unsigned count_bits(uint32_t bits) { return static_cast<unsigned>(__popc(bits)); }
CACHEGEN_DEVICE void atomic_or(uint32_t* at, uint32_t bits) { atomicOr(at, bits); }
// Returns what was there before.
CACHEGEN_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
CACHEGEN_DEVICE void atomic_max(uint32_t* at, uint32_t value) { atomicMax(at, value); }
CACHEGEN_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
CACHEGEN_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
// Rounded to float after every operation, as on the host: no contraction to FMA.
CACHEGEN_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
CACHEGEN_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
CACHEGEN_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
CACHEGEN_DEVICE float nearest_integer(float a) { return rintf(a); }
CACHEGEN_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
CACHEGEN_DEVICE double sum(double a, double b) { return __dadd_rn(a, b); }
CACHEGEN_DEVICE double quotient(double a, double b) { return __ddiv_rn(a, b); }
CACHEGEN_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
CACHEGEN_DEVICE double nearest_integer(double a) { return rint(a); }
CACHEGEN_DEVICE double root(double a) { return __dsqrt_rn(a); }
CACHEGEN_DEVICE uint64_t bits_of_double(double a) {
    return static_cast<uint64_t>(__double_as_longlong(a));
}
CACHEGEN_DEVICE double double_of_bits(uint64_t bits) {
    return __longlong_as_double(static_cast<long long>(bits));
}

// D += A * B for A (16 x 16) and B (16 x 8), halves, in the register layout of mma.m16n8k16.
CACHEGEN_DEVICE void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__HIP_PLATFORM_AMD__)
    // No matrix unit with this layout: every lane gathers the rows and columns that it needs.
    const unsigned lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
    for (unsigned k = 0; k < 16; ++k) {
        const unsigned pair = k % 8 / 2, half = k & 1, high = k / 8;
        const uint32_t top = shuffle(a[2 * high], row * 4 + pair);
        const uint32_t bottom = shuffle(a[2 * high + 1], row * 4 + pair);
        const uint32_t left = shuffle(b[high], column * 4 + pair);
        const uint32_t right = shuffle(b[high], (column + 1) * 4 + pair);
        const auto wide = [half](uint32_t two) {
            _Float16 value;
            const uint16_t bits = static_cast<uint16_t>(two >> 16 * half);
            __builtin_memcpy(&value, &bits, 2);
            return static_cast<float>(value);
        };
        d[0] += wide(top) * wide(left);
        d[1] += wide(top) * wide(right);
        d[2] += wide(bottom) * wide(left);
        d[3] += wide(bottom) * wide(right);
    }
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two 16-bit values of one register, the first one low, rounded to nearest even.
CACHEGEN_DEVICE uint32_t bfloat16_pair(float first, float second);
CACHEGEN_DEVICE uint32_t float16_pair(float first, float second);
#if defined(__HIP_PLATFORM_AMD__)
CACHEGEN_DEVICE uint16_t float16_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
}
CACHEGEN_DEVICE uint32_t float16_pair(float first, float second) {
    return float16_bits(first) | static_cast<uint32_t>(float16_bits(second)) << 16;
}
CACHEGEN_DEVICE uint32_t bfloat16_bits(float value) {
    const uint32_t bits = as_bits(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
CACHEGEN_DEVICE uint32_t bfloat16_pair(float first, float second) {
    return bfloat16_bits(first) | bfloat16_bits(second) << 16;
}
CACHEGEN_DEVICE float float16_value(uint32_t bits) {
    _Float16 half;
    const uint16_t low = static_cast<uint16_t>(bits);
    __builtin_memcpy(&half, &low, 2);
    return static_cast<float>(half);
}
#else
CACHEGEN_DEVICE uint32_t bfloat16_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
CACHEGEN_DEVICE uint32_t float16_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
CACHEGEN_DEVICE float float16_value(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
}
#endif

}  // namespace cachegen
#endif
