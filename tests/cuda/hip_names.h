// What HIP's compiler declares of what the kernels use, as empty C++ declarations: enough for a host
// compiler to check the HIP branch of warp.cuh where there is no hipcc.
#pragma once

#include <cmath>
#include <cstdint>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(threads)

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
};
extern dim3 threadIdx, blockIdx;

void __syncthreads();
void __threadfence_block();
unsigned long long __ballot(int);
unsigned __lane_id();
int __shfl(int, int, int);
int __popc(unsigned);
unsigned atomicOr(unsigned*, unsigned);
unsigned atomicMax(unsigned*, unsigned);
unsigned atomicAdd(unsigned*, unsigned);
float __uint_as_float(unsigned);
unsigned __float_as_uint(float);
long long __double_as_longlong(double);
double __longlong_as_double(long long);
float __fmul_rn(float, float);
float __fadd_rn(float, float);
float __fdiv_rn(float, float);
double __dmul_rn(double, double);
double __dadd_rn(double, double);
double __ddiv_rn(double, double);
double __dsqrt_rn(double);
double __fma_rn(double, double, double);
