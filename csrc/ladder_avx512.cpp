// The fused decoder of `progressive` for AVX-512 with VBMI2: words to values, values to floats,
// floats to rows. docs/fused-decode.md derives it.
#include "ladder_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "float_bits.h"
#include "rans_simd.h"
#include "states_avx512.h"

namespace cachegen {
namespace {

inline __m512i load(const void* at) { return _mm512_load_si512(at); }
inline __m512i words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// ---- Words to values ---------------------------------------------------------------------------

struct CoarseCoder {
    using Table = CoarseTable;

    explicit CoarseCoder(const DecodeRun& run) : values(run.values) {}

    [[gnu::always_inline]] size_t step(Avx512States::Lanes& x, Avx512States::Active active,
                                       const Table* tables, size_t model, const uint8_t* from,
                                       size_t step) {
        const Table& table = tables[model];
        const __m512i slot = _mm512_and_si512(x.low, words(kTotal - 1));
        const __m512i bucket = _mm512_srli_epi16(slot, kProbBits - 5);
        const __mmask32 is_other = _mm512_cmpge_epu16_mask(
            slot, _mm512_permutexvar_epi16(bucket, load(table.threshold)));
        // The own part of a bucket has the bucket's number as its symbol.
        const __m512i symbol =
            _mm512_mask_permutexvar_epi16(bucket, is_other, bucket, load(table.other));
        const __m512i freq16 = _mm512_permutexvar_epi16(symbol, load(table.freq16));
        const __m512i bias = _mm512_mask_permutexvar_epi16(
            _mm512_permutexvar_epi16(bucket, load(table.own_bias)), is_other, bucket,
            load(table.other_bias));
        const __m512i value = _mm512_permutexvar_epi16(symbol, load(table.value));
        _mm512_store_si512(values + step * kLanes, value);
        largest = _mm512_max_epi16(largest, value);
        return Avx512States::advance16(x, active, slot, freq16, bias, from);
    }

    // Escapes are rare: they are looked for where the largest value says that there are any.
    void finish(DecodeRun& run, size_t steps) const {
        const __m512i escape = words(kEscapedValue);
        run.any_escaped = _mm512_cmpeq_epi16_mask(largest, escape) != 0;
        if (!run.any_escaped) return;
        for (size_t step = 0; step < steps; ++step)
            run.escaped[step] = _mm512_cmpeq_epi16_mask(load(values + step * kLanes), escape);
    }

    int16_t* values;
    __m512i largest = words(INT16_MIN);
};

// kLate: some values may have become significant in an earlier refinement.
template <bool kLate>
struct RefineCoder {
    using Table = RefineTable;

    explicit RefineCoder(const DecodeRun& run)
        : values(run.values), late_limit(words(run.late_below - 1)) {}

    [[gnu::always_inline]] size_t step(Avx512States::Lanes& x, Avx512States::Active active,
                                       const Table* tables, size_t model, const uint8_t* from,
                                       size_t step) {
        const Table& table = tables[model / 2];
        int16_t* const at = values + step * kLanes;
        const __m512i value = load(at);
        const __m512i slot = _mm512_and_si512(x.low, words(kTotal - 1));
        // 4 * sign + bucket; the bucket is in the top bits of `low` without its first four.
        const __m512i sign =
            _mm512_max_epi16(_mm512_min_epi16(value, words(1)), words(-1));
        const __m512i index =
            _mm512_shldi_epi16(sign, _mm512_slli_epi16(x.low, 16 - kProbBits), 2);
        const __mmask32 is_other = _mm512_cmpge_epu16_mask(
            slot, _mm512_permutexvar_epi16(index, load(table.threshold)));
        const __m512i part = _mm512_mask_add_epi16(index, is_other, index, words(16));
        const __m512i freq16 = _mm512_permutexvar_epi16(part, load(table.freq16));
        const __m512i bias = _mm512_permutexvar_epi16(part, load(table.bias));
        __m512i change = _mm512_permutexvar_epi16(part, load(table.change));
        if constexpr (kLate) {
            // 0 < |v| < limit, in one unsigned comparison.
            const __m512i below = _mm512_sub_epi16(_mm512_abs_epi16(value), words(1));
            const __mmask32 late = _mm512_cmplt_epu16_mask(below, late_limit);
            change = _mm512_mask_add_epi16(change, late, change, change);
        }
        _mm512_store_si512(at, _mm512_add_epi16(_mm512_mullo_epi16(value, words(3)), change));
        return Avx512States::advance16(x, active, slot, freq16, bias, from);
    }
    void finish(DecodeRun&, size_t) const {}

    int16_t* values;
    __m512i late_limit;
};

// ---- Values to floats --------------------------------------------------------------------------

// The floats of a row: those of the even lanes and those of the odd ones. Each 32-bit element holds
// two values, so no shuffle is needed to widen them.
struct Floats {
    __m512 even, odd;
};

inline __m512 scale(__m512i value, const UnitJob& job, size_t row) {
    const __mmask16 late =
        _mm512_cmplt_epi32_mask(_mm512_abs_epi32(value), _mm512_set1_epi32(job.scaling.late_below));
    const __mmask16 significant = _mm512_test_epi32_mask(value, value);
    const __m512 factor = _mm512_mask_blend_ps(late, _mm512_set1_ps(job.scaling.early_scale),
                                               _mm512_set1_ps(job.scaling.late_scale));
    const __m512 offset = _mm512_mask_blend_ps(late, _mm512_set1_ps(job.early_offset[row]),
                                               _mm512_set1_ps(job.late_offset[row]));
    // offset ^ (value & sign bit), 0 where the value is
    const __m512i moved = _mm512_maskz_ternarylogic_epi32(
        significant, _mm512_castps_si512(offset), value,
        _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0x78);
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(value), factor);
    return _mm512_add_ps(_mm512_add_ps(product, _mm512_castsi512_ps(moved)),
                         _mm512_set1_ps(job.mean[row]));
}

inline bool is_narrow(__m512i values) {  // all from -16 to 15
    return !_mm512_cmpgt_epu16_mask(_mm512_add_epi16(values, words(16)), words(31));
}

inline Floats floats_of(const UnitJob& job, size_t row) {
    const __m512i values = load(job.values + row * kLanes);
    if (job.lookup && is_narrow(values)) [[likely]] {
        const float* const entries = static_cast<const float*>(job.lookup) + row * kLanes;
        const auto look_up = [&](__m512i index) {
            return _mm512_permutex2var_ps(_mm512_load_ps(entries), index,
                                          _mm512_load_ps(entries + 16));
        };
        return {look_up(values), look_up(_mm512_srli_epi32(values, 16))};
    }
    return {scale(_mm512_srai_epi32(_mm512_slli_epi32(values, 16), 16), job, row),
            scale(_mm512_srai_epi32(values, 16), job, row)};
}

// ---- Floats to elements ------------------------------------------------------------------------

// 32 bfloat16 in lane order, rounded to nearest even: one is added to the upper half of the bits
// where the lower one, with 0x7fff and the last bit of the upper one, carries.
inline __m512i to_bfloat16(__m512 even, __m512 odd) {
    const __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
    const __m512i upper = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(e, 16), o);
    const __m512i lower = _mm512_mask_blend_epi16(0xaaaaaaaa, e, _mm512_slli_epi32(o, 16));
    // (upper & 1) | 0x7ffe; the average adds another 1 and halves the sum of 17 bits.
    const __m512i added = _mm512_ternarylogic_epi32(upper, words(1), words(0x7ffe), 0xea);
    return _mm512_add_epi16(upper, _mm512_srli_epi16(_mm512_avg_epu16(lower, added), 15));
}

inline __m256i to_half(__m512 value) {
    const __m512 limit = _mm512_set1_ps(65504.0f);
    const __m512 clamped =
        _mm512_max_ps(_mm512_min_ps(value, limit), _mm512_sub_ps(_mm512_setzero_ps(), limit));
    return _mm512_cvtps_ph(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 32 elements of 16 bits in lane order.
template <KVType kType>
inline __m512i narrow(const Floats& row) {
    if constexpr (kType == KVType::BFloat16) return to_bfloat16(row.even, row.odd);
    return _mm512_or_si512(
        _mm512_cvtepu16_epi32(to_half(row.even)),
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_half(row.odd)), 16));
}

template <KVType kType>
inline void put_row(const Floats& row, void* scratch, size_t index) {
    if constexpr (kType == KVType::Float32) {
        float* const out = static_cast<float*>(scratch) + index * kLanes;
        _mm512_store_ps(out, row.even);
        _mm512_store_ps(out + 16, row.odd);
    } else {
        _mm512_store_si512(static_cast<uint16_t*>(scratch) + index * kLanes, narrow<kType>(row));
    }
}

template <KVType kType>
void convert_rows(const UnitJob& job) {
    const size_t pairs = job.cos ? job.half : 0;
    for (size_t i = 0; i < pairs; ++i) {
        const size_t first = job.interleaved ? 2 * i : i;
        const size_t second = job.interleaved ? 2 * i + 1 : i + pairs;
        const Floats a = floats_of(job, first), b = floats_of(job, second);
        const float *cos = job.cos + i * kLanes, *sin = job.sin + i * kLanes;
        const auto turn = [](__m512 a, __m512 cos, __m512 b, __m512 sin, bool back) {
            const __m512 x = _mm512_mul_ps(a, cos), y = _mm512_mul_ps(b, sin);
            return back ? _mm512_sub_ps(x, y) : _mm512_add_ps(x, y);
        };
        const __m512 c0 = _mm512_loadu_ps(cos), c1 = _mm512_loadu_ps(cos + 16);
        const __m512 s0 = _mm512_loadu_ps(sin), s1 = _mm512_loadu_ps(sin + 16);
        put_row<kType>({turn(a.even, c0, b.even, s0, true), turn(a.odd, c1, b.odd, s1, true)},
                       job.scratch, first);
        put_row<kType>({turn(b.even, c0, a.even, s0, false), turn(b.odd, c1, a.odd, s1, false)},
                       job.scratch, second);
    }
    for (size_t row = 2 * pairs; row < job.size; ++row) {
        if constexpr (kType != KVType::Float32) {
            const __m512i values = load(job.values + row * kLanes);
            if (job.lookup && !job.cos && is_narrow(values)) [[likely]] {
                const auto* const entries = static_cast<const uint16_t*>(job.lookup) + row * kLanes;
                _mm512_store_si512(static_cast<uint16_t*>(job.scratch) + row * kLanes,
                                   _mm512_permutexvar_epi16(values, load(entries)));
                continue;
            }
        }
        put_row<kType>(floats_of(job, row), job.scratch, row);
    }
}

// ---- Elements to rows --------------------------------------------------------------------------

// Transposes 8 x 8 elements of 16 bits in each quarter of 8 registers, as in ladder_avx2.h.
[[gnu::always_inline]] inline void transpose_8x8(__m512i (&rows)[8]) {
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
        __m512i next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = _mm512_unpacklo_epi16(rows[i], rows[i + 4]);
            next[2 * i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 4]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) rows[i] = next[i];
    }
}

// A cache line for each lane from 32 rows of 32 lanes; hands every one to `put(lane, line)`.
template <class Put>
[[gnu::always_inline]] inline void turn_tile(const uint16_t* from, const Put& put) {
    // tile[g][i], quarter q: lane 8 q + i of the rows 8 g to 8 g + 7.
    __m512i tile[4][8];
#pragma GCC unroll 4
    for (size_t g = 0; g < 4; ++g) {
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; ++i) tile[g][i] = load(from + (8 * g + i) * kLanes);
        transpose_8x8(tile[g]);
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) {
        // A 4 x 4 transposition of quarters.
        const __m512i low01 = _mm512_shuffle_i32x4(tile[0][i], tile[1][i], 0x44);
        const __m512i low23 = _mm512_shuffle_i32x4(tile[2][i], tile[3][i], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(tile[0][i], tile[1][i], 0xee);
        const __m512i high23 = _mm512_shuffle_i32x4(tile[2][i], tile[3][i], 0xee);
        put(i, _mm512_shuffle_i32x4(low01, low23, 0x88));
        put(8 + i, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        put(16 + i, _mm512_shuffle_i32x4(high01, high23, 0x88));
        put(24 + i, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

// 64 rows to two lines for each lane, written one after the other: memory takes neighbours in half
// the time. They go past the caches, as nothing of what was there is needed.
void store_two_tiles(const uint16_t* from, size_t offset, std::byte* const* rows) {
    alignas(64) uint16_t first[kLanes][32];
    turn_tile(from, [&](size_t lane, __m512i line) { _mm512_store_si512(first[lane], line); });
    turn_tile(from + 32 * kLanes, [&](size_t lane, __m512i line) {
        if (!rows[lane]) return;
        auto* const to = reinterpret_cast<__m512i*>(rows[lane] + offset);
        _mm512_stream_si512(to, load(first[lane]));
        _mm512_stream_si512(to + 1, line);
    });
}

// Up to 32 rows, or rows of any alignment.
void store_tile(const uint16_t* from, size_t offset, size_t count, std::byte* const* rows) {
    const uint32_t kept = count >= 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
    turn_tile(from, [&](size_t lane, __m512i line) {
        if (rows[lane]) _mm512_mask_storeu_epi16(rows[lane] + offset, kept, line);
    });
}

void store_elements(const UnitJob& job) {
    const auto* const from = static_cast<const uint16_t*>(job.scratch);
    uintptr_t places = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
        places |= reinterpret_cast<uintptr_t>(job.rows[lane]);
    size_t begin = 0;
    if (places % 64 == 0)
        for (; begin + 64 <= job.size; begin += 64)
            store_two_tiles(from + begin * kLanes, begin * sizeof(uint16_t), job.rows);
    for (; begin < job.size; begin += 32)
        store_tile(from + begin * kLanes, begin * sizeof(uint16_t), job.size - begin, job.rows);
}

void store_floats(const UnitJob& job) {
    const auto* const from = static_cast<const float*>(job.scratch);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (!job.rows[lane]) continue;
        const float* column = from + lane / 2 + lane % 2 * 16;
        const __m512i index = _mm512_mullo_epi32(
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
            _mm512_set1_epi32(kLanes));
        for (size_t row = 0; row < job.size; row += 16, column += 16 * kLanes) {
            const size_t left = job.size - row;
            const auto kept = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
            const __m512 values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kept, index,
                                                           column, sizeof(float));
            _mm512_mask_storeu_ps(job.rows[lane] + row * sizeof(float), kept, values);
        }
    }
}

}  // namespace

constinit const uint8_t kAngleLanesAvx512[kLanes] = {
    0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
    1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

void decode_coarse_avx512(const CoarseTable* tables, DecodeRun* const* runs, size_t count,
                          size_t steps) {
    decode_groups<Avx512States, CoarseCoder>(tables, runs, count, steps);
}

void decode_refine_avx512(const RefineTable* tables, int late_below, DecodeRun* const* runs,
                          size_t count, size_t steps) {
    for (size_t i = 0; i < count; ++i) runs[i]->late_below = late_below;
    if (late_below > 1)
        decode_groups<Avx512States, RefineCoder<true>>(tables, runs, count, steps);
    else
        decode_groups<Avx512States, RefineCoder<false>>(tables, runs, count, steps);
}

template <KVType kType>
void store_unit_avx512(const UnitJob& job) {
    if constexpr (kType == KVType::Float32) return store_floats(job);
    store_elements(job);
}

template void store_unit_avx512<KVType::Float16>(const UnitJob&);
template void store_unit_avx512<KVType::BFloat16>(const UnitJob&);
template void store_unit_avx512<KVType::Float32>(const UnitJob&);

template <KVType kType>
void finish_unit_avx512(const UnitJob& job) {
    convert_rows<kType>(job);
    store_unit_avx512<kType>(job);
}

template void finish_unit_avx512<KVType::Float16>(const UnitJob&);
template void finish_unit_avx512<KVType::BFloat16>(const UnitJob&);
template void finish_unit_avx512<KVType::Float32>(const UnitJob&);

}  // namespace cachegen
