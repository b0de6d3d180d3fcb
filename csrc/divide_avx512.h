// Division of 32 states by frequencies for the AVX-512 encoders. docs/fused-encode.md derives it.
#pragma once

#include <immintrin.h>

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker: each has other compiler flags

// A number of 32 bits for each even element, and for each odd one.
struct Wide {
    __m512i even, odd;
};

inline Wide join(__m512i low, __m512i high) {
    return {_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)),
            _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high)};
}
inline __m512i low_halves(const Wide& x) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, x.even, _mm512_slli_epi32(x.odd, 16));
}
inline __m512i high_halves(const Wide& x) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x.even, 16), x.odd);
}

// Frequencies, and reciprocals of them (kReciprocalFactor).
struct Divisor {
    __m512i freq;
    __m512 even, odd;
};

// Halves of quotients, the high ones with anything above the upper 4 of 20 bits.
struct Divided {
    __m512i high, low, rank;
};

// Of states below freq << 20.
[[gnu::always_inline]] inline Divided divide(__m512i high, __m512i low, const Divisor& by) {
    // The product less a half, rounded, is the quotient or one less; at 2^23 the unit of a float is
    // 1, so it stands in the low bits of the sum.
    const Wide state = join(low, high);
    const auto quotient_of = [](__m512i state, __m512 reciprocal) {
        return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepu32_ps(state), reciprocal,
                                                   _mm512_set1_ps(0x1p23f - 0.5f)));
    };
    const Wide quotient{quotient_of(state.even, by.even), quotient_of(state.odd, by.odd)};
    const __m512i quotient_low = low_halves(quotient), quotient_high = high_halves(quotient);
    const __m512i rank = _mm512_sub_epi16(low, _mm512_mullo_epi16(quotient_low, by.freq));
    const __mmask32 one_less = _mm512_cmpge_epu16_mask(rank, by.freq);
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i exact = _mm512_mask_add_epi16(quotient_low, one_less, quotient_low, one);
    const __mmask32 carry = _mm512_mask_testn_epi16_mask(one_less, exact, exact);
    return {_mm512_mask_add_epi16(quotient_high, carry, quotient_high, one), exact,
            _mm512_mask_sub_epi16(rank, one_less, rank, by.freq)};
}

}  // namespace
}  // namespace cachegen
