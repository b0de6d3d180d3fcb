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

// Codes by what a value is: late ones by magnitude, the negative ones from 16 on; early ones by the
// rest of their magnitude.
template <unsigned R>
struct Codes {
    alignas(64) uint16_t late[kLanes], early[kLanes];
};
template <unsigned R>
constexpr Codes<R> kCodes = [] {
    constexpr unsigned half = most_late(R);
    static_assert(half < 16);
    Codes<R> codes{};
    for (unsigned i = 0; i < kLanes; ++i) {
        if (i % 16 <= half) codes.late[i] = code_of<R>(i % 16 + half, false, i >= 16);
        if (i < power_of_three(R)) codes.early[i] = code_of<R>(i, true, false);
    }
    return codes;
}();

// Rows of a tile one after the other; a row nearly always has late values only.
template <unsigned R>
class RowQuantizer {
public:
    explicit RowQuantizer(const QuantizeJob& job)
        : weight_(_mm512_set1_ps(job.weight)),
          inverse_(_mm512_set1_ps(job.inverse)),
          late_codes_(_mm512_load_si512(kCodes<R>.late)),
          early_codes_(_mm512_load_si512(kCodes<R>.early)) {
        for (unsigned i = 0; i < 2; ++i) {
            keep_[i] = _mm512_loadu_si512(job.keep + 16 * i);
            largest_[i] = _mm512_loadu_ps(job.largest + 16 * i);
        }
    }

    void run(const QuantizeJob& job) {
        for (size_t row = 0; row < job.count; ++row) {
            uint16_t* const bins = job.bins ? job.bins + row * kLanes : nullptr;
            quantize(job.rows + row * kLanes, job.mean[row], job.codes + row * kLanes,
                     job.symbols + row * kLanes, bins);
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

    [[gnu::always_inline]] void quantize(const float* row, float mean, uint16_t* codes,
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
        if (early[0] | early[1]) {
            store(pack_inside(inside, 1), in_order(late), in_order(signs), codes, symbols);
            return;
        }
        // 16 more for those that are negative.
        const __m512i index = _mm512_ternarylogic_epi32(late, _mm512_srli_epi16(signs, 11),
                                                        words(16), 0xf8);
        _mm512_storeu_si512(codes, _mm512_permutexvar_epi16(in_order(index), late_codes_));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm256_setzero_si256());
    }

    // Places in the cells of pass 0, in steps or in quarters of them, below the largest of all.
    static __m512i pack_inside(const __m512 (&inside)[2], int unit) {
        const __m512 factor = _mm512_set1_ps(static_cast<float>(unit));
        return in_order(_mm512_min_epi16(
            pack(_mm512_cvttps_epi32(_mm512_mul_ps(inside[0], factor)),
                 _mm512_cvttps_epi32(_mm512_mul_ps(inside[1], factor))),
            words(unit * kReach - 1)));
    }

    // Returns which values are early, and of those what is left of their magnitudes.
    __mmask32 store(__m512i inside, __m512i late, __m512i signs, uint16_t* codes, uint8_t* symbols,
                    __m512i* left = nullptr) const {
        constexpr unsigned shift = std::bit_width(static_cast<unsigned>(kStep)) - 1;
        constexpr int reciprocal = ((65536 << shift) + kStep - 1) / kStep;
        const __m512i index =
            _mm512_srli_epi16(_mm512_mulhi_epu16(inside, words(reciprocal)), shift);
        const __m512i rest = _mm512_sub_epi16(inside, _mm512_mullo_epi16(index, words(kStep)));
        const __mmask32 early = _mm512_test_epi16_mask(index, index);
        const __mmask32 negative = _mm512_movepi16_mask(signs);
        const __m512i of_late = _mm512_permutexvar_epi16(
            _mm512_mask_add_epi16(late, negative, late, words(16)), late_codes_);
        _mm512_storeu_si512(codes, _mm512_mask_permutexvar_epi16(of_late, early, rest,
                                                                 early_codes_));
        const __m512i twice = _mm512_add_epi16(index, index);
        const __m512i symbol =
            _mm512_mask_sub_epi16(twice, early & negative, twice, words(1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols), _mm512_cvtepi16_epi8(symbol));
        if (left) *left = rest;
        return early;
    }

    // With quarters of cells, for the histograms of errors.
    [[gnu::noinline]] void quantize_measured(const __m512i (&bits)[2], const __m512 (&inside)[2],
                                             const __m512 (&cells)[2], uint16_t* codes,
                                             uint8_t* symbols, uint16_t* bins) const {
        const __m512i quarters = pack_inside(inside, 4);
        const __m512 four = _mm512_set1_ps(4);
        const __m512i late = in_order(
            _mm512_min_epi16(pack(_mm512_cvttps_epi32(_mm512_mul_ps(cells[0], four)),
                                  _mm512_cvttps_epi32(_mm512_mul_ps(cells[1], four))),
                             words(4 * kHalf + 3)));
        __m512i rest;
        const __mmask32 early =
            store(_mm512_srli_epi16(quarters, 2), _mm512_srli_epi16(late, 2),
                  in_order(pack(bits[0], bits[1])), codes, symbols, &rest);
        const __m512i in_cell = _mm512_add_epi16(
            _mm512_add_epi16(_mm512_slli_epi16(rest, 2), words(kLateBins(R))),
            _mm512_and_si512(quarters, words(3)));
        _mm512_storeu_si512(bins, _mm512_mask_mov_epi16(late, early, in_cell));
    }

    __m512 weight_, inverse_;
    __m512i late_codes_, early_codes_, keep_[2];
    __m512 largest_[2];
};

// Counts bits of words: bytes of eight lanes are turned, so that a byte holds one bit of each.
class BitCounter {
public:
    void add(__m512i row) {
        const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(kByteOrder.data()), row);
        const __m512i turned = _mm512_gf2p8affine_epi64_epi8(
            _mm512_set1_epi64(static_cast<long long>(0x8040201008040201)), bytes, 0);
        sums_ = _mm512_add_epi8(sums_, _mm512_popcnt_epi8(turned));
    }

    // Adds to counts what was found of each bit of a word, and begins anew.
    void flush(uint32_t (&counts)[16]) {
        alignas(64) uint8_t sums[64];
        _mm512_store_si512(sums, sums_);
        sums_ = _mm512_setzero_si512();
        for (unsigned bit = 0; bit < 16; ++bit)
            for (unsigned part = 0; part < 4; ++part)
                counts[bit] += sums[32 * (bit / 8) + 8 * part + bit % 8];
    }

private:
    // Low bytes of all words first, then the high ones.
    static constexpr auto kByteOrder = [] {
        struct alignas(64) Order : std::array<uint8_t, 64> {} order{};
        for (unsigned i = 0; i < 64; ++i)
            order[i] = static_cast<uint8_t>(2 * (i % 32) + i / 32);
        return order;
    }();

    __m512i sums_ = _mm512_setzero_si512();
};

}  // namespace

template <unsigned R>
void quantize_rows_avx512(const QuantizeJob& job) {
    RowQuantizer<R>(job).run(job);
}
template void quantize_rows_avx512<1>(const QuantizeJob&);
template void quantize_rows_avx512<2>(const QuantizeJob&);
template void quantize_rows_avx512<3>(const QuantizeJob&);

void count_channel_avx512(const uint16_t* codes, const uint8_t* symbols, size_t places,
                          size_t stride, unsigned refinements, uint32_t* counts) {
    // A byte of a counter grows by at most 8 with a row.
    constexpr size_t kRowsAtOnce = 31;
    std::fill_n(counts, kMaxCounts, 0u);
    uint32_t single[16] = {}, seen[16] = {};
    __m256i any = _mm256_setzero_si256();
    for (size_t begin = 0; begin < places; begin += kRowsAtOnce) {
        BitCounter bits, with_context;
        for (size_t place = begin; place < std::min(places, begin + kRowsAtOnce); ++place) {
            const __m512i code = _mm512_loadu_si512(codes + place * stride);
            bits.add(code);
            // The bit of a digit stays where its context is 1.
            const __m512i context = _mm512_or_si512(
                _mm512_and_si512(_mm512_srli_epi16(code, 2), words(011111)),
                _mm512_and_si512(_mm512_srli_epi16(code, 1), words(022222)));
            with_context.add(_mm512_and_si512(code, context));
            any = _mm256_or_si256(any, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                           symbols + place * stride)));
        }
        bits.flush(single);
        with_context.flush(seen);
    }
    const auto all = static_cast<uint32_t>(places * kLanes);
    if (_mm256_testz_si256(any, any))
        counts[0] = all;
    else
        count_coarse(symbols, places, stride, counts);
    for (unsigned pass = 0; pass < refinements; ++pass) {
        uint32_t* const of = counts + kCoarseCounts + kRefineCounts * pass;
        const unsigned bit = 3 * pass;
        of[1] = single[bit] - seen[bit];
        of[2] = single[bit + 1] - seen[bit + 1];
        of[0] = all - single[bit + 2] - of[1] - of[2];
        of[4] = seen[bit];
        of[5] = seen[bit + 1];
        of[3] = single[bit + 2] - of[4] - of[5];
    }
}

}  // namespace cachegen
