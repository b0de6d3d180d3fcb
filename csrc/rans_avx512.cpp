// Kernels for AVX-512 with VBMI, VBMI2, VNNI, BITALG and GFNI (Ice Lake, Zen 4 and later).
// docs/entropy-coding.md derives them. The 32 states of a stream are two registers of 16-bit halves.
#include <immintrin.h>

#include <bit>

#include "alias_avx512.h"
#include "block_avx2.h"
#include "dispatch.h"
#include "divide_avx512.h"
#include "encode_avx512.h"
#include "ladder_avx2.h"
#include "ladder_avx512.h"
#include "mean_rows_avx512.h"
#include "encode_rows.h"
#include "lossless_rows.h"
#include "quantize_avx512.h"
#include "quantize_rows.h"
#include "symbol_rows.h"
#include "rans_simd.h"
#include "states_avx512.h"

namespace cachegen {
namespace {

struct Avx512 : Avx512States {
    // ---- Decoding ------------------------------------------------------------------------------

    // What a table knows about the part of each lane's slot.
    struct Parts {
        __m512i freq, bias;
        __m256i symbol;  // bytes
    };

    template <unsigned K>
    static Parts look_up(__m512i slot, const AliasTable* table, const uint8_t* contexts) {
        if constexpr (K == kContextBuckets) return look_up_in_pair(slot, table, contexts);
        const __m512i bucket = _mm512_srli_epi16(slot, kProbBits - std::countr_zero(K));
        const __m512i threshold = _mm512_permutexvar_epi16(bucket, row(table->threshold));
        const __mmask32 is_other = _mm512_cmpge_epu16_mask(slot, threshold);
        const __m512i part =
            _mm512_mask_add_epi16(bucket, is_other, bucket, _mm512_set1_epi16(K));
        const __m512i symbols = row(table->symbol);
        if constexpr (K == 16) {
            return {_mm512_permutexvar_epi16(part, row(table->freq)),
                    _mm512_permutexvar_epi16(part, row(table->bias)),
                    _mm256_permutexvar_epi8(low_bytes(part), _mm512_castsi512_si256(symbols))};
        }
        // 64 parts are two registers. Two look-ups by bucket, the second under the mask, cost less
        // than one look-up in both.
        const auto both = [&](const uint16_t* entries) {
            return _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(bucket, row(entries)),
                                                 is_other, bucket, row(entries + 32));
        };
        const __m512i part_bytes = _mm512_castsi256_si512(low_bytes(part));
        return {both(table->freq), both(table->bias),
                _mm512_castsi512_si256(_mm512_permutexvar_epi8(part_bytes, symbols))};
    }

    static Parts look_up_in_pair(__m512i slot, const AliasTable* table, const uint8_t* contexts) {
        const AliasTable &a = table[0], &b = table[1];
        const __m512i bucket = _mm512_add_epi16(_mm512_slli_epi16(widen(contexts), 3),
                                                _mm512_srli_epi16(slot, kProbBits - 2));
        const __m512i threshold =
            _mm512_permutexvar_epi16(bucket, pair(a.threshold, b.threshold));
        const __mmask32 is_other = _mm512_cmpge_epu16_mask(slot, threshold);
        const __m512i part =
            _mm512_mask_add_epi16(bucket, is_other, bucket, _mm512_set1_epi16(kContextBuckets));
        const __m128i symbols = _mm_unpacklo_epi64(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a.symbol)),
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b.symbol)));
        return {_mm512_permutexvar_epi16(part, pair(a.freq, b.freq)),
                _mm512_permutexvar_epi16(part, pair(a.bias, b.bias)),
                _mm256_permutexvar_epi8(low_bytes(part), _mm256_castsi128_si256(symbols))};
    }

    template <unsigned K>
    [[gnu::always_inline]] static size_t decode_step(Lanes& x, Active active,
                                                       const AliasTable* table,
                                                       const uint8_t* contexts,
                                                       const uint8_t* words, uint8_t* symbols) {
        const __m512i slot = _mm512_and_si512(x.low, _mm512_set1_epi16(kTotal - 1));
        const Parts parts = look_up<K>(slot, table, contexts);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), parts.symbol);

        return advance(x, active, slot, parts.freq, parts.bias, words);
    }

    // ---- Encoding ------------------------------------------------------------------------------

    // What an inverse table knows about the symbol of each lane.
    struct Symbols {
        __m512i freq, first;
        __m512i index;  // into the reciprocals
        __mmask32 missing;
    };

    static __m512i widen(const uint8_t* block_row) {
        return _mm512_cvtepu8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block_row)));
    }

    template <unsigned K>
    static Symbols look_up(__m512i symbol, __m512i context, const InverseTable* table) {
        if constexpr (K == kContextBuckets) {
            const __m512i index = _mm512_add_epi16(_mm512_slli_epi16(context, 3), symbol);
            return {_mm512_permutexvar_epi16(index, pair(table[0].freq, table[1].freq)),
                    _mm512_permutexvar_epi16(index, pair(table[0].first, table[1].first)), index,
                    _mm512_cmpge_epu16_mask(symbol, _mm512_set1_epi16(kContextBuckets))};
        }
        return {_mm512_permutexvar_epi16(symbol, row(table->freq)),
                _mm512_permutexvar_epi16(symbol, row(table->first)), symbol, 0};
    }

    // Reciprocals of the frequencies of the even lanes.
    template <unsigned K>
    static __m512 reciprocals(__m512i index, const InverseTable* table) {
        if constexpr (K == kContextBuckets) {
            const __m512d both = _mm512_insertf64x4(
                _mm512_castps_pd(_mm512_castps256_ps512(_mm256_load_ps(table[0].reciprocal))),
                _mm256_castps_pd(_mm256_load_ps(table[1].reciprocal)), 1);
            return _mm512_permutexvar_ps(index, _mm512_castpd_ps(both));
        }
        if constexpr (K == 16)
            return _mm512_permutexvar_ps(index, _mm512_load_ps(table->reciprocal));
        return _mm512_permutex2var_ps(_mm512_load_ps(table->reciprocal), index,
                                      _mm512_load_ps(table->reciprocal + 16));
    }

    // The slots at these positions, by binary search for their parts.
    template <unsigned K>
    static __m512i find_slots(__m512i position, __m512i context, const InverseTable* table) {
        // Of 64 parts the upper half is for positions from part_begin[32] on: two look-ups, the
        // second under a mask, cost less than one in both halves.
        __mmask32 upper = 0;
        if constexpr (K == 32)
            upper = _mm512_cmpge_epu16_mask(
                position, _mm512_set1_epi16(static_cast<short>(table->part_begin[32])));
        const auto entries = [&](const uint16_t* own, const uint16_t* next, __m512i at) {
            if constexpr (K == kContextBuckets)
                return _mm512_permutexvar_epi16(at, pair(own, next));
            const __m512i lower = _mm512_permutexvar_epi16(at, row(own));
            if constexpr (K == 16) return lower;
            return _mm512_mask_permutexvar_epi16(lower, upper, at, row(own + 32));
        };
        __m512i part = K == kContextBuckets ? _mm512_slli_epi16(context, 3)
                                            : _mm512_setzero_si512();
#pragma GCC unroll 6
        for (unsigned half = K == 32 ? 16 : K; half; half /= 2) {
            const __m512i middle =
                _mm512_add_epi16(part, _mm512_set1_epi16(static_cast<short>(half)));
            const __m512i begin = entries(table[0].part_begin, table[1].part_begin, middle);
            const __mmask32 beyond = _mm512_cmple_epu16_mask(begin, position);
            part = _mm512_mask_mov_epi16(part, beyond, middle);
        }
        return _mm512_add_epi16(position, entries(table[0].part_shift, table[1].part_shift, part));
    }

    template <unsigned K>
    [[gnu::always_inline]] static void encode_step(Lanes& x, Active active, uint16_t*& words,
                                                   __mmask32& missing, const InverseTable* table,
                                                   const uint8_t* row, const uint8_t* contexts) {
        const __m512i context =
            K == kContextBuckets ? widen(contexts) : _mm512_setzero_si512();
        const Symbols symbols = look_up<K>(widen(row), context, table);
        missing |= symbols.missing | _mm512_testn_epi16_mask(symbols.freq, symbols.freq);

        // A state spills if x >= freq << 20. Compressed, the words are in ascending lane order;
        // they go below those of the step behind.
        const __mmask32 spills = _mm512_mask_cmpge_epu16_mask(
            active, _mm512_srli_epi16(x.high, 4), symbols.freq);
        const size_t count = count_bits(spills);
        words -= count;
        _mm512_mask_storeu_epi16(words, static_cast<__mmask32>((uint64_t{1} << count) - 1),
                                 _mm512_maskz_compress_epi16(spills, x.low));
        x.low = _mm512_mask_mov_epi16(x.low, spills, x.high);
        x.high = _mm512_maskz_mov_epi16(static_cast<__mmask32>(~spills), x.high);

        const Divided divided =
            divide(x.high, x.low,
                   {symbols.freq, reciprocals<K>(symbols.index, table),
                    reciprocals<K>(_mm512_srli_epi32(symbols.index, 16), table)});
        const __m512i slot =
            find_slots<K>(_mm512_add_epi16(symbols.first, divided.rank), context, table);
        // x = quotient << 12 | slot
        x.high = _mm512_shldi_epi16(divided.high, divided.low, kProbBits);
        x.low = _mm512_or_si512(_mm512_slli_epi16(divided.low, kProbBits), slot);
    }

    template <unsigned K, size_t N>
    static void encode_side_by_side(const InverseTable* tables, EncodeRun* const* runs,
                                    size_t steps) {
        Lanes x[N];
        Active active[N];
        __mmask32 missing[N] = {};
        // Copies, because the compiler must assume that storing words changes the runs.
        uint16_t* words[N];
        const uint16_t* models[N];
        const uint8_t *symbols[N], *contexts[N];
        for (size_t i = 0; i < N; ++i) {
            x[i] = load(runs[i]->state);
            active[i] = active_lanes(runs[i]->lanes);
            words[i] = runs[i]->words;
            models[i] = runs[i]->models;
            symbols[i] = runs[i]->symbols;
            contexts[i] = runs[i]->contexts;
        }
        for (size_t step = steps; step-- > 0;) {
#pragma GCC unroll 4
            for (size_t i = 0; i < N; ++i)
                encode_step<K>(x[i], active[i], words[i], missing[i], tables + models[i][step],
                               symbols[i] + step * kLanes,
                               K == kContextBuckets ? contexts[i] + step * kLanes : nullptr);
        }
        for (size_t i = 0; i < N; ++i) {
            // Idle lanes went through the motions; their states must stay.
            uint32_t state[kLanes];
            store(x[i], state);
            std::memcpy(runs[i]->state, state, sizeof state[0] * runs[i]->lanes);
            runs[i]->words = words[i];
            runs[i]->uncodable |= (missing[i] & active[i]) != 0;
        }
    }

    // As many at a time as the registers hold, then half as many, and so on.
    template <unsigned K, size_t N = kSideBySide>
    static void encode_groups(const InverseTable* tables, EncodeRun* const* runs, size_t count,
                              size_t steps) {
        for (; count >= N; count -= N, runs += N) encode_side_by_side<K, N>(tables, runs, steps);
        if constexpr (N > 1) encode_groups<K, N / 2>(tables, runs, count, steps);
    }

    static void encode_runs(const InverseTable* tables, unsigned buckets, EncodeRun* const* runs,
                            size_t count, size_t steps) {
        switch (buckets) {
            case kContextBuckets:
                return encode_groups<kContextBuckets>(tables, runs, count, steps);
            case 16: return encode_groups<16>(tables, runs, count, steps);
            default: return encode_groups<32>(tables, runs, count, steps);
        }
    }

private:
    // 8 entries of the tables of both contexts side by side.
    static __m512i pair(const uint16_t* first, const uint16_t* second) {
        return _mm512_castsi256_si512(_mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(first))),
            _mm_load_si128(reinterpret_cast<const __m128i*>(second)), 1));
    }

    static __m512i row(const void* entries) { return _mm512_load_si512(entries); }

    // The low byte of every 16-bit element, in order.
    static __m256i low_bytes(__m512i elements) {
        const __m512i even = _mm512_set_epi64(
            0, 0, 0, 0, 0x3e3c3a3836343230, 0x2e2c2a2826242220, 0x1e1c1a1816141210,
            0x0e0c0a0806040200);
        return _mm512_castsi512_si256(_mm512_permutexvar_epi8(even, elements));
    }
};

}  // namespace

constinit const Kernels kAvx512Kernels = {
    .isa = "avx512",
    .is_available = has_avx512,
    .decode_runs = decode_runs<Avx512>,
    .encode_runs = Avx512::encode_runs,
    .build_alias = build_alias_avx512,
    .build_inverse = build_inverse_avx512,
    .scatter = scatter_avx2,
    .gather = gather_avx2,
    .decode_coarse = decode_coarse_avx512,
    .decode_refine = decode_refine_avx512,
    .find_bytes = find_bytes_avx2,
    .coarse_values = coarse_values,
    .value_contexts = value_contexts,
    .refine_values = refine_values,
    .finish_unit = {finish_unit_avx512<KVType::Float16>, finish_unit_avx512<KVType::BFloat16>,
                    finish_unit_avx512<KVType::Float32>},
    .fill_lookup = {fill_lookup<KVType::Float16>, fill_lookup<KVType::BFloat16>,
                    fill_lookup<KVType::Float32>},
    .turn_means = {turn_means_avx512<KVType::Float16>, turn_means_avx512<KVType::BFloat16>,
                   turn_means<KVType::Float32>},
    .scale_rows = scale_rows,
    .finish_row = {finish_row<KVType::Float16>, finish_row<KVType::BFloat16>,
                   finish_row<KVType::Float32>},
    .encode_rows = with_avx512(encode_rows()),
    .angle_lanes = kAngleLanesAvx512,
    .per_type = {row_kernels_avx512<KVType::Float16>(), row_kernels_avx512<KVType::BFloat16>(),
                 row_kernels<KVType::Float32>()},
    .symbol_rows = symbol_rows(),
    .lossless_rows = {lossless_rows<KVType::Float16>(), lossless_rows<KVType::BFloat16>(),
                      lossless_rows<KVType::Float32>()},
};

}  // namespace cachegen
