// What the product kernels for AVX-512 share: values to slots, values to floats, and floats to
// elements. A file that includes this gets it compiled for its own instruction set.
#pragma once

#include <immintrin.h>

#include "dispatch.h"
#include "ladder_avx512.h"
#include "product.h"

namespace cachegen {
namespace {

inline __m512i values_of(const ExpandJob& job, size_t slot) {
    return _mm512_load_si512(job.values + size_t{job.components[slot]} * kLanes);
}

inline bool is_zero(const ExpandJob& job) {
    __m512i any = _mm512_setzero_si512();
    for (size_t slot = 0; slot < kSlotBlock; ++slot)
        any = _mm512_or_si512(any, values_of(job, slot));
    return !_mm512_test_epi32_mask(any, any);
}

// 16 values of one slot, widened to 32 bits.
inline __m512 scale(__m512i value, const SlotScale& slot, int late_below) {
    const __mmask16 late =
        _mm512_cmplt_epi32_mask(_mm512_abs_epi32(value), _mm512_set1_epi32(late_below));
    const __mmask16 significant = _mm512_test_epi32_mask(value, value);
    const __m512 factor = _mm512_mask_blend_ps(late, _mm512_set1_ps(slot.early_scale),
                                               _mm512_set1_ps(slot.late_scale));
    const __m512 offset = _mm512_mask_blend_ps(late, _mm512_set1_ps(slot.early_offset),
                                               _mm512_set1_ps(slot.late_offset));
    // offset ^ (value & sign bit), 0 where the value is
    const __m512i moved = _mm512_maskz_ternarylogic_epi32(
        significant, _mm512_castps_si512(offset), value,
        _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0x78);
    return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(value), factor),
                         _mm512_castsi512_ps(moved));
}

// The values of a table: 0 to 15, then -16 to -1.
inline __m512i table_values(bool negative) {
    const __m512i count =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return negative ? _mm512_sub_epi32(count, _mm512_set1_epi32(16)) : count;
}

inline bool is_narrow(__m512i values) {  // all from -16 to 15
    return !_mm512_cmpgt_epu16_mask(_mm512_add_epi16(values, _mm512_set1_epi16(16)),
                                    _mm512_set1_epi16(31));
}

// The 32 floats of a row: even lanes, odd lanes.
struct Pair {
    __m512 even, odd;
};

inline __m256i to_half(__m512 value) {
    const __m512 limit = _mm512_set1_ps(65504.0f);
    const __m512 clamped =
        _mm512_max_ps(_mm512_min_ps(value, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    return _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 32 elements of 16 bits: those of the even lanes, then those of the odd ones.
template <KVType kType>
inline __m512i narrow(const Pair& row) {
    if constexpr (kType == KVType::Float16)
        return _mm512_inserti64x4(_mm512_castsi256_si512(to_half(row.even)), to_half(row.odd), 1);
#ifdef __AVX512BF16__
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row.odd, row.even));
#else
    const auto round = [](__m512 value) {
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_srli_epi32(
            _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))), 16);
    };
    const __m512i even_then_odd = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,
        30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi16(round(row.even), even_then_odd, round(row.odd));
#endif
}

template <KVType kType>
inline void put_row(const Pair& row, void* scratch, size_t index) {
    if constexpr (kType == KVType::Float32) {
        float* const out = static_cast<float*>(scratch) + index * kLanes;
        _mm512_store_ps(out, row.even);
        _mm512_store_ps(out + 16, row.odd);
    } else {
        _mm512_store_si512(static_cast<uint16_t*>(scratch) + index * kLanes, narrow<kType>(row));
    }
}

template <KVType kType>
void finish_floats(const FinishJob& job) {
    const UnitJob& unit = job.unit;
    const __m512 factor = _mm512_set1_ps(job.factor);
    const auto row_of = [&](size_t row) -> Pair {
        const float* const from = job.values + row * kLanes;
        const __m512 mean = _mm512_set1_ps(unit.mean[row]);
        return {_mm512_fmadd_ps(_mm512_load_ps(from), factor, mean),
                _mm512_fmadd_ps(_mm512_load_ps(from + 16), factor, mean)};
    };
    const size_t pairs = unit.cos ? unit.half : 0;
    for (size_t i = 0; i < pairs; ++i) {
        const size_t first = unit.interleaved ? 2 * i : i;
        const size_t second = unit.interleaved ? 2 * i + 1 : i + pairs;
        const Pair a = row_of(first), b = row_of(second);
        const float *cos = unit.cos + i * kLanes, *sin = unit.sin + i * kLanes;
        const __m512 c0 = _mm512_loadu_ps(cos), c1 = _mm512_loadu_ps(cos + 16);
        const __m512 s0 = _mm512_loadu_ps(sin), s1 = _mm512_loadu_ps(sin + 16);
        put_row<kType>({_mm512_fmsub_ps(a.even, c0, _mm512_mul_ps(b.even, s0)),
                        _mm512_fmsub_ps(a.odd, c1, _mm512_mul_ps(b.odd, s1))},
                       unit.scratch, first);
        put_row<kType>({_mm512_fmadd_ps(b.even, c0, _mm512_mul_ps(a.even, s0)),
                        _mm512_fmadd_ps(b.odd, c1, _mm512_mul_ps(a.odd, s1))},
                       unit.scratch, second);
    }
    for (size_t row = 2 * pairs; row < unit.size; ++row)
        put_row<kType>(row_of(row), unit.scratch, row);
    store_unit_avx512<kType>(unit);
}

}  // namespace
}  // namespace cachegen
