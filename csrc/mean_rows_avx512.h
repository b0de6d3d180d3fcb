// Rows of means for AVX-512: 32 dimensions of a token at a time.
#pragma once

#include <immintrin.h>

#include <bit>

#include "ladder_rows.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

// 32 floats to elements in their order.
template <KVType kType>
inline __m512i round_floats(__m512 first, __m512 second) {
    if constexpr (kType == KVType::BFloat16) {
        // As in ladder_avx512.cpp: one is added to upper halves where the lower ones carry.
        const __m512i evens = _mm512_set_epi16(
            62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20,
            18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
        const __m512i lower = _mm512_permutex2var_epi16(a, evens, b);
        const __m512i upper =
            _mm512_permutex2var_epi16(a, _mm512_or_si512(evens, _mm512_set1_epi16(1)), b);
        const __m512i added = _mm512_ternarylogic_epi32(upper, _mm512_set1_epi16(1), _mm512_set1_epi16(0x7ffe), 0xea);
        return _mm512_add_epi16(upper, _mm512_srli_epi16(_mm512_avg_epu16(lower, added), 15));
    }
    const auto half = [](__m512 value) {
        const __m512 limit = _mm512_set1_ps(65504.0f);
        const __m512 clamped =
            _mm512_max_ps(_mm512_min_ps(value, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
        return _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(first)), half(second), 1);
}

template <KVType kType>
void turn_means_avx512(const MeansJob& job) {
    constexpr size_t kPart = 32;
    if (job.interleaved || job.half % kPart || job.size != 2 * job.half)
        return turn_means<kType>(job);
    for (uint32_t lanes = job.lanes; lanes; lanes &= lanes - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
        const float *cos = job.angles + 2 * job.half * lane, *sin = cos + job.half;
        const float *first = job.mean, *second = job.mean + job.half;
        auto* const out = reinterpret_cast<uint16_t*>(job.rows[lane]);
        const bool is_kept = job.is_read_again >> lane & 1 ||
                             reinterpret_cast<uintptr_t>(out) % 64;
        const auto put = [&](size_t at, __m512i elements) {
            if (is_kept)
                _mm512_storeu_si512(out + at, elements);
            else
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out + at), elements);
        };
        for (size_t i = 0; i < job.half; i += kPart) {
            __m512 x[2], y[2];
            for (size_t k = 0; k < 2; ++k) {
                const size_t at = i + 16 * k;
                const __m512 a = _mm512_loadu_ps(first + at), b = _mm512_loadu_ps(second + at);
                const __m512 c = _mm512_loadu_ps(cos + at), s = _mm512_loadu_ps(sin + at);
                x[k] = _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s));
                y[k] = _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s));
            }
            put(i, round_floats<kType>(x[0], x[1]));
            put(job.half + i, round_floats<kType>(y[0], y[1]));
        }
    }
}

void find_values_avx512(const int16_t* values, size_t rows, uint32_t* found) {
    for (size_t row = 0; row < rows; ++row) {
        const __m512i lanes = _mm512_load_si512(values + row * kLanes);
        found[row] = _mm512_test_epi16_mask(lanes, lanes);
    }
}

}  // namespace
}  // namespace cachegen
