// The 32 states of a stream in AVX-512 registers, and what a decoded symbol does to them.
// docs/entropy-coding.md derives it.
#pragma once

#include <immintrin.h>

#include "dispatch.h"
#include "rans_simd.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker: each has other compiler flags

struct Avx512States {
    static constexpr size_t kSideBySide = 4;
    struct Lanes {
        __m512i high, low;  // halves of the states; element l is lane l
    };
    using Active = __mmask32;

    static Active active_lanes(unsigned count) { return ~uint32_t{0} >> (kLanes - count); }

    static Lanes load(const uint32_t* state) {
        const __m512i first = _mm512_loadu_si512(state), second = _mm512_loadu_si512(state + 16);
        const auto join = [](__m512i a, __m512i b) {
            return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)),
                                      _mm512_cvtepi32_epi16(b), 1);
        };
        return {join(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16)),
                join(first, second)};
    }

    static void store(Lanes x, uint32_t* state) {
        const auto join = [&](int half) {
            const auto widen = [&](__m512i halves) {
                return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(halves, 1)
                                                  : _mm512_castsi512_si256(halves));
            };
            return _mm512_or_si512(_mm512_slli_epi32(widen(x.high), 16), widen(x.low));
        };
        _mm512_storeu_si512(state, join(0));
        _mm512_storeu_si512(state + 16, join(1));
    }

    // Leaves the symbol with this frequency and bias behind; returns how many words were taken.
    [[gnu::always_inline]] static size_t advance(Lanes& x, Active active, __m512i slot,
                                                 __m512i freq, __m512i bias,
                                                 const uint8_t* words) {
        // x = freq * (x >> 12) + rank. The quotient has 20 bits: its low 16 and its top 4.
        const __m512i quotient = _mm512_shldi_epi16(x.high, x.low, 16 - kProbBits);
        const __m512i quotient_top = _mm512_srli_epi16(x.high, kProbBits);
        const __m512i rank = _mm512_add_epi16(slot, bias);
        const __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(freq, quotient), rank);
        const __m512i product_high =
            _mm512_add_epi16(_mm512_mulhi_epu16(freq, quotient),
                             _mm512_mullo_epi16(freq, quotient_top));
        const __mmask32 carry = _mm512_cmplt_epu16_mask(low, rank);
        const __m512i high = _mm512_mask_add_epi16(product_high, carry, product_high,
                                                   _mm512_set1_epi16(1));
        return refill(x, active, high, low, words);
    }

    // The same with 16 times the frequency, which is below 4096: one instruction less.
    [[gnu::always_inline]] static size_t advance16(Lanes& x, Active active, __m512i slot,
                                                   __m512i freq16, __m512i bias,
                                                   const uint8_t* words) {
        // x = freq16 * high + freq * (low >> 12) + rank. The second product is the upper half of
        // freq16 * (low & 0xf000); with the rank, which is below freq, it has 16 bits.
        const __m512i top = _mm512_and_si512(x.low, _mm512_set1_epi16(-int{kTotal}));
        const __m512i added = _mm512_add_epi16(_mm512_mulhi_epu16(freq16, top),
                                               _mm512_add_epi16(slot, bias));
        const __m512i low = _mm512_add_epi16(_mm512_mullo_epi16(freq16, x.high), added);
        const __mmask32 carry = _mm512_cmplt_epu16_mask(low, added);
        const __m512i product_high = _mm512_mulhi_epu16(freq16, x.high);
        const __m512i high = _mm512_mask_add_epi16(product_high, carry, product_high,
                                                   _mm512_set1_epi16(1));
        return refill(x, active, high, low, words);
    }

private:
    [[gnu::always_inline]] static size_t refill(Lanes& x, Active active, __m512i high, __m512i low,
                                                const uint8_t* words) {
        // Where the high half is 0, the low one moves up and the next word takes its place.
        const __mmask32 hungry = _mm512_mask_testn_epi16_mask(active, high, high);
        x.high = _mm512_mask_mov_epi16(high, hungry, low);
        x.low = _mm512_mask_expand_epi16(low, hungry, _mm512_loadu_si512(words));
        return count_bits(hungry);
    }
};

}  // namespace
}  // namespace cachegen
