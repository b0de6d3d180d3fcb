// Digits of the `progressive` encoder and their counts for AVX-512. docs/fused-encode.md derives
// them; encode_rows.h says the same element by element.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "count_coarse_avx2.h"
#include "encode_avx512.h"

namespace cachegen {
namespace {

inline __m512i words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// The three bits that a code has for each pass, first one lowest, of base-3 digits `rest`. Late
// values are significant from their first digit that is not 1, which tells the sign.
template <unsigned R>
constexpr uint16_t code_of(unsigned rest, bool early, bool negative) {
    unsigned code = 0;
    bool seen = early;
    for (unsigned pass = 1; pass <= R; ++pass) {
        const auto unit = static_cast<unsigned>(power_of_three(R - pass));
        const unsigned digit = rest / unit % 3;
        const unsigned coded = !seen && digit == 2 && negative ? 0 : digit;
        code |= (coded | (seen ? 4u : 0u)) << (3 * (pass - 1));
        seen |= digit != 1;
    }
    return static_cast<uint16_t>(code);
}

// Bit 5 * (pass - 1) + i: whether the field of the pass is i + 1, where context 1 makes 3, 4 and 5
// of digits. The top bit is for values that are significant in pass 0.
constexpr unsigned kEarlyBit = 15;
template <unsigned R>
constexpr uint16_t flags_of(unsigned code) {
    unsigned flags = 0;
    for (unsigned pass = 0; pass < R; ++pass) {
        const unsigned field = code >> 3 * pass & 7, number = field - (field >> 2);
        if (number) flags |= 1u << (5 * pass + number - 1);
    }
    return static_cast<uint16_t>(flags);
}

// Codes by what a value is: late ones by magnitude, the negative ones from 16 on; early ones by the
// rest of their magnitude. And the flags of these codes.
template <unsigned R>
struct Codes {
    alignas(64) uint16_t late[kLanes], early[kLanes], late_flags[kLanes], early_flags[kLanes];
};
template <unsigned R>
constexpr Codes<R> kCodes = [] {
    constexpr unsigned half = most_late(R);
    static_assert(half < 16);
    Codes<R> codes{};
    for (unsigned i = 0; i < kLanes; ++i) {
        if (i % 16 <= half) codes.late[i] = code_of<R>(i % 16 + half, false, i >= 16);
        if (i < power_of_three(R)) codes.early[i] = code_of<R>(i, true, false);
        codes.late_flags[i] = flags_of<R>(codes.late[i]);
        codes.early_flags[i] = flags_of<R>(codes.early[i]);
    }
    return codes;
}();

// How often each bit is set in a row of words, added to 64 counters: bytes of eight lanes are turned,
// so that a byte holds one bit of each. Counter 8 i + b is for bit b of some low bytes, from 32 on of
// the high ones.
inline void count_bits(__m512i row, uint8_t* counters) {
    static constexpr auto kByteOrder = [] {
        struct alignas(64) Order : std::array<uint8_t, 64> {} order{};
        for (unsigned i = 0; i < 64; ++i)
            order[i] = static_cast<uint8_t>(2 * (i % 32) + i / 32);
        return order;
    }();
    const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kByteOrder.data()), row);
    const __m512i turned = _mm512_gf2p8affine_epi64_epi8(
        _mm512_set1_epi64(static_cast<long long>(0x8040201008040201)), bytes, 0);
    _mm512_storeu_si512(counters,
                        _mm512_add_epi8(_mm512_loadu_si512(counters), _mm512_popcnt_epi8(turned)));
}

// Sums of the counters of each bit.
inline void add_tally(const uint8_t* tally, uint16_t (&set)[16]) {
    for (unsigned half = 0; half < 2; ++half) {
        const __m512i wide = _mm512_cvtepu8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tally + 32 * half)));
        const __m256i two = _mm256_add_epi16(_mm512_castsi512_si256(wide),
                                             _mm512_extracti64x4_epi64(wide, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(set + 8 * half),
                         _mm_add_epi16(_mm256_castsi256_si128(two),
                                       _mm256_extracti128_si256(two, 1)));
    }
}

// Rows of a tile one after the other; a row nearly always has late values only.
template <unsigned R>
class RowQuantizer {
public:
    explicit RowQuantizer(const QuantizeJob& job)
        : weight_(_mm512_set1_ps(job.weight)),
          inverse_(_mm512_set1_ps(job.inverse)),
          late_codes_(_mm512_load_si512(kCodes<R>.late)),
          early_codes_(_mm512_load_si512(kCodes<R>.early)),
          late_flags_(_mm512_load_si512(kCodes<R>.late_flags)),
          early_flags_(_mm512_load_si512(kCodes<R>.early_flags)) {
        for (unsigned i = 0; i < 2; ++i) {
            keep_[i] = _mm512_loadu_si512(job.keep + 16 * i);
            largest_[i] = _mm512_loadu_ps(job.largest + 16 * i);
        }
    }

    void run(const QuantizeJob& job) {
        for (size_t row = 0; row < job.count; ++row) {
            uint16_t* const bins = job.bins ? job.bins + row * kLanes : nullptr;
            const __m512i flags =
                quantize(job.rows + row * kLanes, job.mean[row], job.codes + row * kLanes,
                         job.symbols + row * kLanes, bins);
            if (job.tallies) count_bits(flags, job.tallies + row * kTally);
        }
        for (unsigned i = 0; i < 2; ++i) _mm512_storeu_ps(job.largest + 16 * i, largest_[i]);
    }

private:
    static constexpr int kStep = power_of_three(R);
    static constexpr int kHalf = most_late(R);
    static constexpr int kReach = static_cast<int>(kMaxCoarse + 1) * kStep;

    // Two halves of integers as one row of words. What packing leaves in the wrong order is put
    // right by `in_order`.
    static __m512i pack(__m512i low, __m512i high) { return _mm512_packs_epi32(low, high); }
    static __m512i in_order(__m512i packed) {
        return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
    }

    // Returns the flags of all codes.
    [[gnu::always_inline]] __m512i quantize(const float* row, float mean, uint16_t* codes,
                                            uint8_t* symbols, uint16_t* bins) {
        const __m512 centre = _mm512_set1_ps(mean);
        __m512i bits[2];
        __m512 inside[2], cells[2];
        __mmask16 early[2];
#pragma GCC unroll 2
        for (unsigned i = 0; i < 2; ++i) {
            const __m512 moved =
                _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(row + 16 * i), weight_), centre);
            bits[i] = _mm512_and_si512(_mm512_castps_si512(_mm512_mul_ps(moved, inverse_)),
                                       keep_[i]);
            const __m512 exact = _mm512_castsi512_ps(
                _mm512_and_si512(bits[i], _mm512_set1_epi32(0x7fffffff)));
            // Of a NaN and a number both take the number, the second one.
            largest_[i] = _mm512_max_ps(exact, largest_[i]);
            const __m512 magnitude = _mm512_min_ps(exact, _mm512_set1_ps(kReach));
            inside[i] = _mm512_add_ps(magnitude, _mm512_set1_ps(0.4f * kStep));
            cells[i] = _mm512_add_ps(_mm512_mul_ps(magnitude, _mm512_set1_ps(1 / 1.2f)),
                                     _mm512_set1_ps(0.5f));
            early[i] = _mm512_cmp_ps_mask(inside[i], _mm512_set1_ps(kStep), _CMP_GE_OQ);
        }
        if (bins) return quantize_measured(bits, inside, cells, codes, symbols, bins);
        const __m512i late = _mm512_min_epi16(
            pack(_mm512_cvttps_epi32(cells[0]), _mm512_cvttps_epi32(cells[1])), words(kHalf));
        const __m512i signs = pack(bits[0], bits[1]);
        if (early[0] | early[1])
            return store(pack_inside(inside, 1), in_order(late), in_order(signs), codes, symbols)
                .flags;
        // 16 more for those that are negative.
        const __m512i index = in_order(_mm512_ternarylogic_epi32(
            late, _mm512_srli_epi16(signs, 11), words(16), 0xf8));
        _mm512_storeu_si512(codes, _mm512_permutexvar_epi16(index, late_codes_));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm256_setzero_si256());
        return _mm512_permutexvar_epi16(index, late_flags_);
    }

    // Places in the cells of pass 0, in steps or in quarters of them, below the largest of all.
    static __m512i pack_inside(const __m512 (&inside)[2], int unit) {
        const __m512 factor = _mm512_set1_ps(static_cast<float>(unit));
        return in_order(_mm512_min_epi16(
            pack(_mm512_cvttps_epi32(_mm512_mul_ps(inside[0], factor)),
                 _mm512_cvttps_epi32(_mm512_mul_ps(inside[1], factor))),
            words(unit * kReach - 1)));
    }

    // Which values are early, what is left of their magnitudes in their cells, and flags of all.
    struct Stored {
        __mmask32 early;
        __m512i rest, flags;
    };

    Stored store(__m512i inside, __m512i late, __m512i signs, uint16_t* codes,
                 uint8_t* symbols) const {
        constexpr unsigned shift = std::bit_width(static_cast<unsigned>(kStep)) - 1;
        constexpr int reciprocal = ((65536 << shift) + kStep - 1) / kStep;
        const __m512i index =
            _mm512_srli_epi16(_mm512_mulhi_epu16(inside, words(reciprocal)), shift);
        const __m512i rest = _mm512_sub_epi16(inside, _mm512_mullo_epi16(index, words(kStep)));
        const __mmask32 early = _mm512_test_epi16_mask(index, index);
        const __mmask32 negative = _mm512_movepi16_mask(signs);
        const __m512i of_late = _mm512_mask_add_epi16(late, negative, late, words(16));
        const auto find = [&](__m512i late_entries, __m512i early_entries) {
            return _mm512_mask_permutexvar_epi16(
                _mm512_permutexvar_epi16(of_late, late_entries), early, rest, early_entries);
        };
        _mm512_storeu_si512(codes, find(late_codes_, early_codes_));
        const __m512i twice = _mm512_add_epi16(index, index);
        const __m512i symbol =
            _mm512_mask_sub_epi16(twice, early & negative, twice, words(1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm512_cvtepi16_epi8(symbol));
        const __m512i flags = find(late_flags_, early_flags_);
        return {early, rest,
                _mm512_or_si512(flags, _mm512_maskz_mov_epi16(early, words(1 << kEarlyBit)))};
    }

    // With quarters of cells, for the histograms of errors.
    [[gnu::noinline]] __m512i quantize_measured(const __m512i (&bits)[2],
                                                const __m512 (&inside)[2],
                                                const __m512 (&cells)[2], uint16_t* codes,
                                                uint8_t* symbols, uint16_t* bins) const {
        const __m512i quarters = pack_inside(inside, 4);
        const __m512 four = _mm512_set1_ps(4);
        const __m512i late = in_order(
            _mm512_min_epi16(pack(_mm512_cvttps_epi32(_mm512_mul_ps(cells[0], four)),
                                  _mm512_cvttps_epi32(_mm512_mul_ps(cells[1], four))),
                             words(4 * kHalf + 3)));
        const Stored stored = store(_mm512_srli_epi16(quarters, 2), _mm512_srli_epi16(late, 2),
                                    in_order(pack(bits[0], bits[1])), codes, symbols);
        const __m512i in_cell = _mm512_add_epi16(
            _mm512_add_epi16(_mm512_slli_epi16(stored.rest, 2), words(kLateBins(R))),
            _mm512_and_si512(quarters, words(3)));
        _mm512_storeu_si512(bins, _mm512_mask_mov_epi16(late, stored.early, in_cell));
        return stored.flags;
    }

    __m512 weight_, inverse_;
    __m512i late_codes_, early_codes_, late_flags_, early_flags_, keep_[2];
    __m512 largest_[2];
};

}  // namespace

template <unsigned R>
void quantize_rows_avx512(const QuantizeJob& job) {
    RowQuantizer<R>(job).run(job);
}
template void quantize_rows_avx512<1>(const QuantizeJob&);
template void quantize_rows_avx512<2>(const QuantizeJob&);
template void quantize_rows_avx512<3>(const QuantizeJob&);

void count_channel_avx512(const uint16_t* codes, const uint8_t* symbols, const uint8_t* tally,
                          size_t places, size_t stride, unsigned refinements, uint32_t* counts) {
    std::fill_n(counts, kMaxCounts, 0u);
    const auto all = static_cast<uint32_t>(places * kLanes);
    uint16_t set[16] = {};  // how often each bit of the flags is
    if (tally) add_tally(tally, set);
    if (tally && !set[kEarlyBit])
        counts[0] = all;
    else
        count_coarse(symbols, places, stride, counts);
    uint32_t* of = counts + kCoarseCounts;
    for (unsigned pass = 0; pass < refinements; ++pass, of += kRefineCounts) {
        of[0] = all;
        for (unsigned field = 1; field < kRefineCounts; ++field) {
            if (tally) {
                of[field] = set[5 * pass + field - 1];
            } else {
                const unsigned code = field < 3 ? field : field + 1;
                for (size_t place = 0; place < places; ++place)
                    of[field] += static_cast<uint32_t>(std::popcount(_mm512_cmpeq_epi16_mask(
                        _mm512_and_si512(
                            _mm512_srli_epi16(_mm512_loadu_si512(codes + place * stride), 3 * pass),
                            words(7)),
                        words(static_cast<int>(code)))));
            }
            of[0] -= of[field];
        }
    }
}

}  // namespace cachegen
