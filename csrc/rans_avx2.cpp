// Kernels for AVX2. docs/entropy-coding.md derives them. The 32 states of a stream are four
// registers of 16-bit halves; tables are looked up byte by byte, 16 entries at a time.
#include <immintrin.h>

#include <array>
#include <bit>

#include "block_avx2.h"
#include "dispatch.h"
#include "encode_avx2.h"
#include "ladder_avx2.h"
#include "encode_rows.h"
#include "lossless_rows.h"
#include "quantize_rows.h"
#include "symbol_rows.h"
#include "rans_simd.h"

namespace cachegen {
namespace {

// Entry m moves the first words of a register to the 16-bit elements whose bits are set in m, in
// order, and zeros to all others.
constexpr auto kSpreadWords = [] {
    std::array<std::array<uint8_t, 16>, 256> table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (unsigned element = 0; element < 8; ++element) {
            const bool takes = mask >> element & 1;
            table[mask][2 * element] = takes ? next++ : uint8_t{0x80};
            table[mask][2 * element + 1] = takes ? next++ : uint8_t{0x80};
        }
    }
    return table;
}();

inline __m128i load_half(const void* at) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
}

// The same 16 bytes in both halves, as byte shuffles work within halves.
inline __m256i load_twice(const void* at) { return _mm256_broadcastsi128_si256(load_half(at)); }

inline __m256i is_at_least(__m256i a, __m256i b) {  // 16-bit, unsigned
    return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
}

struct Avx2 {
    static constexpr size_t kSideBySide = 4;

    // 16-bit values of all lanes: lanes 0-7 and 16-23 in the first register, 8-15 and 24-31 in the
    // second. In this order packing both to bytes gives the lanes from 0 to 31.
    struct Wide {
        __m256i part[2];
    };
    struct Lanes {
        Wide high, low;
    };
    using Active = uint32_t;  // bit l is lane l

    static __m256i pack(const Wide& x) { return _mm256_packus_epi16(x.part[0], x.part[1]); }
    static Wide unpack(__m256i low, __m256i high) {
        return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    }

    static Active active_lanes(unsigned count) { return ~uint32_t{0} >> (kLanes - count); }

    static Lanes load(const uint32_t* state) {
        Lanes x;
        for (int i = 0; i < 2; ++i) {
            const uint32_t* first = state + 8 * i;
            const __m256i a = _mm256_set_m128i(load_half(first + 16), load_half(first));
            const __m256i b = _mm256_set_m128i(load_half(first + 20), load_half(first + 4));
            const __m256i low_bits = _mm256_set1_epi32(0xffff);
            x.high.part[i] =
                _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
            x.low.part[i] = _mm256_packus_epi32(_mm256_and_si256(a, low_bits),
                                                _mm256_and_si256(b, low_bits));
        }
        return x;
    }

    static void store(const Lanes& x, uint32_t* state) {
        const auto put = [](uint32_t* first, __m256i states) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(states));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(first + 16),
                             _mm256_extracti128_si256(states, 1));
        };
        for (int i = 0; i < 2; ++i) {
            put(state + 8 * i, _mm256_unpacklo_epi16(x.low.part[i], x.high.part[i]));
            put(state + 8 * i + 4, _mm256_unpackhi_epi16(x.low.part[i], x.high.part[i]));
        }
    }

    // What a table knows about the part of each lane's slot.
    struct Parts {
        Wide freq, bias;
        __m256i symbol;  // bytes
    };

    // Looks up bytes in tables of 16 entries, one for each index register. An index with its top
    // bit set gives 0, so if each lane has a sound index in one register, `or` joins the results.
    template <size_t N>
    struct Index {
        __m256i in[N];
        __m256i operator()(const uint8_t* entries) const {
            __m256i found = _mm256_shuffle_epi8(load_twice(entries), in[0]);
#pragma GCC unroll 4
            for (size_t i = 1; i < N; ++i)
                found = _mm256_or_si256(
                    found, _mm256_shuffle_epi8(load_twice(entries + 16 * i), in[i]));
            return found;
        }
    };

    // Indices to twice as many entries: the second half of them where `second` is set.
    template <size_t N>
    static Index<2 * N> choose(const Index<N>& index, __m256i second) {
        const __m256i first = _mm256_andnot_si256(second, _mm256_set1_epi8(-128));
        Index<2 * N> both;
#pragma GCC unroll 2
        for (size_t i = 0; i < N; ++i) {
            both.in[i] = _mm256_or_si256(index.in[i], second);
            both.in[i + N] = _mm256_or_si256(index.in[i], first);
        }
        return both;
    }

    template <unsigned K>
    static Parts look_up(const Wide& slot, const AliasTable* table, const uint8_t* contexts) {
        if constexpr (K == kContextBuckets) return look_up_in_pair(slot, table, contexts);
        constexpr int width_bits = kProbBits - std::countr_zero(K);
        const __m256i width_mask = _mm256_set1_epi16((1 << width_bits) - 1);
        Wide wide_bucket, wide_offset;
        for (int i = 0; i < 2; ++i) {
            wide_bucket.part[i] = _mm256_srli_epi16(slot.part[i], width_bits);
            wide_offset.part[i] = _mm256_and_si256(slot.part[i], width_mask);
        }
        const __m256i bucket = pack(wide_bucket), offset = pack(wide_offset);
        const auto by_bucket = [&] {
            if constexpr (K == 16) return Index<1>{{bucket}};
            // A shuffle sees only the low 4 bits of a bucket.
            else return choose(Index<1>{{bucket}},
                               _mm256_cmpgt_epi8(bucket, _mm256_set1_epi8(15)));
        }();
        const __m256i is_other =
            _mm256_cmpeq_epi8(_mm256_max_epu8(offset, by_bucket(table->cut)), offset);
        const auto by_part = choose(by_bucket, is_other);
        return {unpack(by_part(table->freq_low), by_part(table->freq_high)),
                unpack(by_part(table->bias_low), by_part(table->bias_high)),
                by_part(table->symbol)};
    }

    // The tables of both contexts side by side: 8 own parts and 8 other ones of 16 bits.
    static Parts look_up_in_pair(const Wide& slot, const AliasTable* table,
                                 const uint8_t* contexts) {
        const __m256i context_bytes =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(contexts));
        const Wide context = unpack(context_bytes, _mm256_setzero_si256());
        const AliasTable &a = table[0], &b = table[1];
        const auto own = [](const uint16_t* first, const uint16_t* second) {
            return _mm256_unpacklo_epi64(load_twice(first), load_twice(second));
        };
        const auto other = [](const uint16_t* first, const uint16_t* second) {
            return _mm256_unpackhi_epi64(load_twice(first), load_twice(second));
        };
        Parts parts;
        Wide part_number;
        for (int i = 0; i < 2; ++i) {
            const __m256i in_table = _mm256_srli_epi16(slot.part[i], kProbBits - 2);
            const __m256i bucket =
                _mm256_add_epi16(_mm256_slli_epi16(context.part[i], 2), in_table);
            // Indices of the two bytes of an element.
            const __m256i index =
                _mm256_add_epi16(_mm256_mullo_epi16(bucket, _mm256_set1_epi16(0x0202)),
                                 _mm256_set1_epi16(0x0100));
            const __m256i threshold = _mm256_shuffle_epi8(own(a.threshold, b.threshold), index);
            const __m256i is_other = is_at_least(slot.part[i], threshold);
            const Index<2> by_part = choose(Index<1>{{index}}, is_other);
            const auto find = [&](const uint16_t* first, const uint16_t* second) {
                return _mm256_or_si256(_mm256_shuffle_epi8(own(first, second), by_part.in[0]),
                                       _mm256_shuffle_epi8(other(first, second), by_part.in[1]));
            };
            parts.freq.part[i] = find(a.freq, b.freq);
            parts.bias.part[i] = find(a.bias, b.bias);
            const __m256i four = _mm256_set1_epi16(kContextBuckets);
            part_number.part[i] =
                _mm256_add_epi16(_mm256_add_epi16(_mm256_slli_epi16(context.part[i], 3), in_table),
                                 _mm256_and_si256(is_other, four));
        }
        const __m256i symbols =
            _mm256_unpacklo_epi64(load_twice(a.symbol), load_twice(b.symbol));
        parts.symbol = _mm256_shuffle_epi8(symbols, pack(part_number));
        return parts;
    }

    template <unsigned K>
    [[gnu::always_inline]] static size_t decode_step(Lanes& x, Active active,
                                                       const AliasTable* table,
                                                       const uint8_t* contexts,
                                                       const uint8_t* words, uint8_t* symbols) {
        Wide slot;
        for (int i = 0; i < 2; ++i)
            slot.part[i] = _mm256_and_si256(x.low.part[i], _mm256_set1_epi16(kTotal - 1));
        const Parts parts = look_up<K>(slot, table, contexts);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), parts.symbol);

        Wide low, high, hungry;
        for (int i = 0; i < 2; ++i) {
            // x = freq * (x >> 12) + rank. The quotient has 20 bits: its low 16 and its top 4.
            const __m256i freq = parts.freq.part[i];
            const __m256i quotient =
                _mm256_or_si256(_mm256_slli_epi16(x.high.part[i], 16 - kProbBits),
                                _mm256_srli_epi16(x.low.part[i], kProbBits));
            const __m256i quotient_top = _mm256_srli_epi16(x.high.part[i], kProbBits);
            const __m256i rank = _mm256_add_epi16(slot.part[i], parts.bias.part[i]);
            low.part[i] = _mm256_add_epi16(_mm256_mullo_epi16(freq, quotient), rank);
            const __m256i product_high =
                _mm256_add_epi16(_mm256_mulhi_epu16(freq, quotient),
                                 _mm256_mullo_epi16(freq, quotient_top));
            // A carry into the high half: 1, and -1 if there was none.
            const __m256i no_carry = is_at_least(low.part[i], rank);
            high.part[i] = _mm256_add_epi16(_mm256_add_epi16(product_high, _mm256_set1_epi16(1)),
                                            no_carry);
            hungry.part[i] = _mm256_cmpeq_epi16(high.part[i], _mm256_setzero_si256());
        }

        // Where the high half is 0, the low one moves up and the next word takes its place. Every
        // 8 lanes take their words from where those of the lanes before them end.
        const auto mask = active & static_cast<uint32_t>(_mm256_movemask_epi8(
                                       _mm256_packs_epi16(hungry.part[0], hungry.part[1])));
        const auto words_of = [&](unsigned first_lane) {
            const uint32_t lanes_before = (uint32_t{1} << first_lane) - 1;
            return _mm_shuffle_epi8(load_half(words + 2 * count_bits(mask & lanes_before)),
                                    load_half(kSpreadWords[mask >> first_lane & 255].data()));
        };
        for (unsigned i = 0; i < 2; ++i) {
            const __m256i spread = _mm256_set_m128i(words_of(16 + 8 * i), words_of(8 * i));
            x.high.part[i] = _mm256_or_si256(high.part[i],
                                             _mm256_and_si256(low.part[i], hungry.part[i]));
            x.low.part[i] =
                _mm256_or_si256(_mm256_andnot_si256(hungry.part[i], low.part[i]), spread);
        }
        return count_bits(mask);
    }
};

}  // namespace

constinit const Kernels kAvx2Kernels = {
    .isa = "avx2",
    .is_available = has_avx2,
    .decode_runs = decode_runs<Avx2>,
    .encode_runs = encode_runs_scalar,
    .build_alias = nullptr,
    .build_inverse = nullptr,
    .scatter = scatter_avx2,
    .gather = gather_avx2,
    .decode_coarse = nullptr,
    .decode_refine = nullptr,
    .find_bytes = find_bytes_avx2,
    .coarse_values = coarse_values,
    .value_contexts = value_contexts,
    .refine_values = refine_values,
    .finish_unit = {finish_unit_avx2<KVType::Float16>, finish_unit_avx2<KVType::BFloat16>,
                    finish_unit_avx2<KVType::Float32>},
    .fill_lookup = {},
    .turn_means = {turn_means<KVType::Float16>, turn_means<KVType::BFloat16>,
                   turn_means<KVType::Float32>},
    .scale_rows = scale_rows,
    .finish_row = {finish_row<KVType::Float16>, finish_row<KVType::BFloat16>,
                   finish_row<KVType::Float32>},
    .encode_rows = with_avx2(encode_rows()),
    .angle_lanes = kLanesInOrder,
    .per_type = {row_kernels<KVType::Float16>(), row_kernels<KVType::BFloat16>(),
                 row_kernels<KVType::Float32>()},
    .symbol_rows = symbol_rows(),
    .lossless_rows = {lossless_rows<KVType::Float16>(), lossless_rows<KVType::BFloat16>(),
                      lossless_rows<KVType::Float32>()},
};

}  // namespace cachegen
