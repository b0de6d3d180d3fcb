// Max-abs quantisation of 16-bit types without divisions, for AVX-512.
#pragma once

#include <immintrin.h>

#include "quantize_rows.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

inline uint32_t max_magnitude_avx512(const void* values, size_t size) {
    const auto* bits = static_cast<const uint16_t*>(values);
    const __m512i mask = _mm512_set1_epi16(0x7fff);
    __m512i largest[2] = {};
    size_t i = 0;
    for (; i + 64 <= size; i += 64)
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; ++half)
            largest[half] = _mm512_max_epu16(
                largest[half], _mm512_and_si512(mask, _mm512_loadu_si512(bits + i + 32 * half)));
    for (; i < size; i += 32) {
        const __mmask32 there = ~uint32_t{0} >> (size - i < 32 ? 32 - (size - i) : 0);
        largest[0] = _mm512_max_epu16(
            largest[0], _mm512_and_si512(mask, _mm512_maskz_loadu_epi16(there, bits + i)));
    }
    const __m512i both = _mm512_max_epu16(largest[0], largest[1]);
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
    const __m128i eight =
        _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The least of the complements.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi32(-1)));
    return static_cast<uint16_t>(~static_cast<unsigned>(_mm_cvtsi128_si32(least)));
}

// The quotient of a value with 11 bits times `levels` and a maximum with 11 bits is half an integer
// or at least 2^-20 of itself away from one. Where it is, the correction by the exact remainder
// makes it exact, as it would be in a division; elsewhere the last bits do not decide.
template <KVType kType>
void quantize_row_avx512(const void* values, size_t size, float levels, float maximum,
                         uint8_t* symbols) {
    // Beyond these the remainder might lose bits.
    if (!(maximum >= 0x1p-80f && maximum <= 0x1p100f))
        return quantize_row<kType>(values, size, levels, maximum, symbols);
    const auto* bits = static_cast<const uint16_t*>(values);
    const __m512 factor = _mm512_set1_ps(levels), by = _mm512_set1_ps(maximum);
    const __m512 inverse = _mm512_set1_ps(1.0f / maximum);
    const __m512 rounder = _mm512_set1_ps(0x1.8p23f);  // see quantize_row; its low half is 0
    const __m512i offset = _mm512_set1_epi16(static_cast<short>(levels));
    const auto rounded = [&](__m512 value) {
        const __m512 scaled = _mm512_mul_ps(value, factor);
        const __m512 near = _mm512_mul_ps(scaled, inverse);
        const __m512 exact =
            _mm512_fmadd_ps(_mm512_fnmadd_ps(near, by, scaled), inverse, near);
        return _mm512_castps_si512(_mm512_add_ps(exact, rounder));
    };
    for (size_t i = 0; i < size; i += 32) {
        const __mmask32 there = ~uint32_t{0} >> (size - i < 32 ? 32 - (size - i) : 0);
        const __m512i row = _mm512_maskz_loadu_epi16(there, bits + i);
        __m512i joined;
        if constexpr (kType == KVType::BFloat16) {
            const __m512i even = rounded(_mm512_castsi512_ps(_mm512_slli_epi32(row, 16)));
            const __m512i odd = rounded(_mm512_castsi512_ps(
                _mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
            joined = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
        } else {
            const __m512i low = rounded(_mm512_cvtph_ps(_mm512_castsi512_si256(row)));
            const __m512i high = rounded(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(row, 1)));
            joined = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)),
                                        _mm512_cvtepi32_epi16(high), 1);
        }
        _mm512_mask_cvtepi16_storeu_epi8(symbols + i, there, _mm512_add_epi16(joined, offset));
    }
}

template <KVType kType>
constexpr Kernels::PerType row_kernels_avx512() {
    Kernels::PerType kernels = row_kernels<kType>();
    kernels.max_magnitude = max_magnitude_avx512;
    kernels.quantize = quantize_row_avx512<kType>;
    return kernels;
}

}  // namespace
}  // namespace cachegen
