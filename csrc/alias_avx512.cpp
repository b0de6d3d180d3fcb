// Alias tables and their inverses for AVX-512, a whole model in registers. docs/fused-encode.md,
// "Tables without steps", derives it; alias_table.cpp does the same step by step.
#include "alias_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace cachegen {
namespace {

inline __m512i words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

constexpr auto kIota = [] {
    struct alignas(64) Row : std::array<uint16_t, 32> {} row{};
    for (unsigned i = 0; i < 32; ++i) row[i] = static_cast<uint16_t>(i);
    return row;
}();
inline __m512i iota() { return _mm512_load_si512(kIota.data()); }

inline __m512i find(__m512i index, __m512i of) { return _mm512_permutexvar_epi16(index, of); }

// Sums of all elements up to each one.
inline __m512i sums_of(__m512i x) {
#pragma GCC unroll 5
    for (int by = 1; by < 32; by *= 2)
        x = _mm512_add_epi16(x, _mm512_maskz_permutexvar_epi16(
                                    ~uint32_t{0} << by, _mm512_sub_epi16(iota(), words(by)), x));
    return x;
}

// How many of the rising numbers `of`, up to 31, are below each of x, or not above it.
template <bool kOrEqual>
inline __m512i count_below(__m512i x, __m512i of) {
    __m512i count = _mm512_setzero_si512();
#pragma GCC unroll 5
    for (int half = 16; half; half /= 2) {
        const __m512i next = find(_mm512_add_epi16(count, words(half - 1)), of);
        const __mmask32 more =
            kOrEqual ? _mm512_cmple_epu16_mask(next, x) : _mm512_cmplt_epu16_mask(next, x);
        count = _mm512_mask_add_epi16(count, more, count, words(half));
    }
    return count;
}

// What every bucket holds: so many slots of its own symbol, then those of another one.
struct Shares {
    __m512i cut, other;
};

// Symbols in the order in which they are taken, from the last one down; `small` and `large` are the
// ones with less than a bucket and the others. Sums: what small ones need to fill their buckets, and
// what large ones have beyond theirs.
template <unsigned K>
class Sharing {
public:
    explicit Sharing(__m512i freqs) {
        const __m512i reversed = _mm512_sub_epi16(words(K - 1), iota());
        backwards_ = find(reversed, freqs);
        const __mmask32 all = K == 32 ? ~uint32_t{0} : 0xffff;
        small_ = _mm512_mask_cmplt_epu16_mask(all, backwards_, words(kWidth));
        large_ = all & ~small_;
        const auto first = [](__mmask32 of) {
            return static_cast<__mmask32>((uint64_t{1} << std::popcount(of)) - 1);
        };
        some_small_ = first(small_), some_large_ = first(large_);
        needs_ = _mm512_maskz_sub_epi16(some_small_, words(kWidth),
                                        _mm512_maskz_compress_epi16(small_, backwards_));
        const __m512i beyond = _mm512_maskz_sub_epi16(
            some_large_, _mm512_maskz_compress_epi16(large_, backwards_), words(kWidth));
        needed_ = sums_of(needs_);
        large_symbols_ = _mm512_maskz_compress_epi16(large_, reversed);
        const __m512i none = words(-1);
        const __m512i has = _mm512_mask_mov_epi16(none, some_large_, sums_of(beyond));
        const __m512i ends = _mm512_mask_mov_epi16(none, some_small_, needed_);
        // Small symbol j is filled up by the first large one that has something left.
        giver_ = count_below<false>(_mm512_sub_epi16(needed_, needs_), has);
        // Large symbol i gives up at the first small one that it cannot fill and keep a bucket.
        last_ = count_below<true>(has, ends);
        gives_up_ = _mm512_mask_cmplt_epu16_mask(
            some_large_, last_, words(std::popcount(some_small_)));
        given_ = find(last_, needed_);  // behind the last small one all sums are the same
        cut_ = _mm512_mask_sub_epi16(words(kWidth), gives_up_,
                                     _mm512_add_epi16(has, words(kWidth)), given_);
        next_ = _mm512_mask_permutexvar_epi16(large_symbols_, gives_up_,
                                              _mm512_add_epi16(iota(), words(1)), large_symbols_);
    }

    Shares shares() const {
        const __m512i others = _mm512_maskz_expand_epi16(small_, find(giver_, large_symbols_));
        return {in_order(_mm512_mask_expand_epi16(backwards_, large_, cut_)),
                in_order(_mm512_mask_expand_epi16(others, large_, next_))};
    }

    // Ranks of the first slots of both parts of every bucket.
    struct Ranks {
        __m512i own, other;
    };
    Ranks ranks() const {
        // Of the smalls that large symbol i fills, those with a lower number lie below it: they
        // come from `above` on.
        const __m512i before = _mm512_maskz_permutexvar_epi16(
            ~uint32_t{1}, _mm512_sub_epi16(iota(), words(1)), given_);
        const __m512i above = find(
            _mm512_sub_epi16(_mm512_sub_epi16(words(K - 1), large_symbols_), iota()),
            _mm512_sub_epi16(needed_, needs_));
        const auto below = [&](__m512i from, __m512i to) {
            return _mm512_sub_epi16(
                to, _mm512_min_epu16(_mm512_max_epu16(above, from), to));
        };
        const __m512i own = below(before, given_);
        const __m512i following = _mm512_add_epi16(iota(), words(1));
        const __m512i of_next = _mm512_add_epi16(find(following, cut_),
                                                 below(given_, find(following, given_)));
        // The part that the large symbol before has left over lies above all that i fills and that
        // have a lower number than it.
        const __m512i symbols = in_small(_mm512_sub_epi16(words(K - 1), iota()));
        const auto add_if_lower = [&](__m512i sum, __m512i of, __m512i size) {
            const __mmask32 lower = _mm512_cmplt_epu16_mask(of, symbols);
            return _mm512_mask_add_epi16(sum, lower, sum, size);
        };
        __m512i of_small = _mm512_sub_epi16(find(giver_, given_), needed_);
        of_small = add_if_lower(of_small, find(giver_, large_symbols_), find(giver_, cut_));
        const __m512i previous = _mm512_sub_epi16(giver_, words(1));
        const __m512i left = _mm512_mask_sub_epi16(
            _mm512_setzero_si512(), _mm512_test_epi16_mask(giver_, giver_), words(kWidth),
            find(previous, cut_));
        of_small = add_if_lower(of_small, find(previous, large_symbols_), left);
        // A bucket that is all its own has an empty other part, right behind.
        const __m512i of_large = _mm512_mask_mov_epi16(_mm512_add_epi16(own, words(kWidth)),
                                                       gives_up_, of_next);
        return {in_order(_mm512_maskz_expand_epi16(large_, own)),
                in_order(_mm512_mask_expand_epi16(_mm512_maskz_expand_epi16(small_, of_small),
                                                  large_, of_large))};
    }

private:
    static constexpr int kWidth = kTotal / K;

    static __m512i in_order(__m512i backwards) {
        return find(_mm512_sub_epi16(words(K - 1), iota()), backwards);
    }
    __m512i in_small(__m512i backwards) const {
        return _mm512_maskz_compress_epi16(small_, backwards);
    }

    __m512i backwards_, needs_, needed_, large_symbols_, giver_, last_, given_, cut_, next_;
    __mmask32 small_, large_, some_small_, some_large_, gives_up_;
};

inline __m512i row_of(const uint16_t* freqs, size_t alphabet) {
    return _mm512_maskz_loadu_epi16(~uint32_t{0} >> (32 - alphabet), freqs);
}

inline void store_half(void* to, __m512i row) {
    _mm256_store_si256(static_cast<__m256i*>(to), _mm512_castsi512_si256(row));
}
inline void store_bytes(uint8_t* to, __m512i row) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(row));
}

// With 16 buckets both parts fit one register.
inline __m512i join(__m512i own, __m512i other) {
    return _mm512_inserti64x4(own, _mm512_castsi512_si256(other), 1);
}

template <unsigned K>
inline void build_alias(__m512i freqs, AliasTable& table) {
    constexpr int width = kTotal / K;
    const Sharing<K> sharing(freqs);
    const Shares shares = sharing.shares();
    const auto ranks = sharing.ranks();
    const __m512i begin = _mm512_mullo_epi16(iota(), words(width));
    const __m512i middle = _mm512_add_epi16(begin, shares.cut);
    const __m512i freq[2] = {freqs, find(shares.other, freqs)};
    const __m512i bias[2] = {_mm512_sub_epi16(ranks.own, begin),
                             _mm512_sub_epi16(ranks.other, middle)};
    const __m512i cut = _mm512_min_epu16(shares.cut, words(255));
    if constexpr (K == 16) {
        const __m512i freqs_of = join(freq[0], freq[1]), biases = join(bias[0], bias[1]);
        store_half(table.threshold, middle);
        _mm512_store_si512(table.freq, freqs_of);
        _mm512_store_si512(table.bias, biases);
        store_bytes(table.symbol, join(iota(), shares.other));
        _mm_store_si128(reinterpret_cast<__m128i*>(table.cut),
                        _mm512_castsi512_si128(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(cut))));
        store_bytes(table.freq_low, freqs_of);
        store_bytes(table.freq_high, _mm512_srli_epi16(freqs_of, 8));
        store_bytes(table.bias_low, biases);
        store_bytes(table.bias_high, _mm512_srli_epi16(biases, 8));
        return;
    }
    _mm512_store_si512(table.threshold, middle);
    store_bytes(table.cut, cut);
    for (unsigned part = 0; part < 2; ++part) {
        _mm512_store_si512(table.freq + 32 * part, freq[part]);
        _mm512_store_si512(table.bias + 32 * part, bias[part]);
        store_bytes(table.symbol + 32 * part, part ? shares.other : iota());
        store_bytes(table.freq_low + 32 * part, freq[part]);
        store_bytes(table.freq_high + 32 * part, _mm512_srli_epi16(freq[part], 8));
        store_bytes(table.bias_low + 32 * part, bias[part]);
        store_bytes(table.bias_high + 32 * part, _mm512_srli_epi16(bias[part], 8));
    }
}

// The shares of a model as numbers, and where the parts of its symbols begin.
struct alignas(64) Unsorted {
    uint16_t cut[32], other[32], first[32];
};

// Every symbol has its own part, which may be empty, and the others that it fills.
template <unsigned K>
inline void sort_parts(const Unsorted& from, uint32_t* parts) {
    constexpr uint32_t width = kTotal / K;
    uint32_t next[K + 1] = {};  // index of the next part, and its position above
    for (unsigned b = 0; b < K; ++b) ++next[from.other[b] + 1u];
    uint32_t index = 0;
    for (unsigned s = 0; s < K; ++s) {
        index += next[s];
        next[s] = (index + s) | uint32_t{from.first[s]} << 16;
    }
    const auto put = [&](unsigned symbol, uint32_t slot, uint32_t size) {
        const uint32_t both = next[symbol], position = both >> 16;
        parts[both & 0xffff] = position | (slot - position) << 16;
        next[symbol] = both + 1 + (size << 16);
    };
    for (unsigned b = 0; b < K; ++b) {
        put(b, b * width, from.cut[b]);
        put(from.other[b], b * width + from.cut[b], width - from.cut[b]);
    }
}

template <unsigned K>
inline void build_inverse(__m512i freqs, const float* reciprocals, InverseTable& table) {
    const Shares shares = Sharing<K>(freqs).shares();
    alignas(64) uint32_t parts[64];
    Unsorted unsorted;
    const __m512i first = _mm512_sub_epi16(sums_of(freqs), freqs);
    _mm512_store_si512(unsorted.cut, shares.cut);
    _mm512_store_si512(unsorted.other, shares.other);
    _mm512_store_si512(unsorted.first, first);
    sort_parts<K>(unsorted, parts);
    _mm512_store_si512(table.freq, freqs);
    _mm512_store_si512(table.first, first);
    alignas(64) uint16_t each[32];
    _mm512_store_si512(each, freqs);
    for (unsigned s = 0; s < K; ++s) table.reciprocal[s] = reciprocals[each[s]];
    if constexpr (K == 16) {  // the unused entries
        _mm512_store_ps(table.reciprocal + 16, _mm512_setzero_ps());
        _mm512_store_si512(table.part_begin + 32, words(kTotal));
        _mm512_store_si512(table.part_shift + 32, _mm512_setzero_si512());
    }
    for (unsigned i = 0; i < K / 16; ++i) {
        const __m512i low = _mm512_load_si512(parts + 32 * i);
        const __m512i high = _mm512_load_si512(parts + 32 * i + 16);
        _mm512_store_si512(table.part_begin + 32 * i,
                           _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low)),
                                              _mm512_cvtepi32_epi16(high), 1));
        _mm512_store_si512(
            table.part_shift + 32 * i,
            _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16))),
                _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)), 1));
    }
}

}  // namespace

void build_alias_avx512(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                        AliasTable* tables) {
    for (size_t n = 0; n < count; ++n, freqs += alphabet) {
        const __m512i row = row_of(freqs, alphabet);
        if (buckets == 16)
            build_alias<16>(row, tables[n]);
        else
            build_alias<32>(row, tables[n]);
    }
}

void build_inverse_avx512(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                          const float* reciprocals, InverseTable* tables) {
    for (size_t n = 0; n < count; ++n, freqs += alphabet) {
        const __m512i row = row_of(freqs, alphabet);
        if (buckets == 16)
            build_inverse<16>(row, reciprocals, tables[n]);
        else
            build_inverse<32>(row, reciprocals, tables[n]);
    }
}

}  // namespace cachegen
