// What the models of a channel are made from: how often its symbols occur, and which of the frozen
// tables codes them shortest. As plain C++ for the compiler to vectorise, and with the instructions
// that x86 has for it; docs/fused-encode.md, "Counting with carries".
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "bit_planes.h"
#include "dispatch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

// As wide as a register: of wider ones compilers may make single bytes.
#if defined(__AVX512BW__)
using Bytes [[gnu::vector_size(64)]] = uint8_t;
#elif defined(__AVX2__)
using Bytes [[gnu::vector_size(32)]] = uint8_t;
#else
using Bytes [[gnu::vector_size(16)]] = uint8_t;
#endif

// Eight bits from bit `at` on; those behind `end` bytes are 0.
inline uint64_t eight_bits(const uint8_t* bits, uint64_t at, uint64_t end) {
    uint64_t both = bits[at / 8];
    if (at % 8 && at / 8 + 1 < end) both |= uint64_t{bits[at / 8 + 1]} << 8;
    return both >> at % 8;
}

// Bit i of the planes, joined, for `size` places from bit `at` on.
inline void join_planes(const PackedRow& from, size_t size, uint8_t* out) {
    size_t i = 0;
#if defined(__AVX512BW__)
    for (; from.at % 8 == 0 && i + 64 <= size; i += 64) {
        __m512i joined = _mm512_setzero_si512();
        for (unsigned bit = 0; bit < from.bits; ++bit) {
            uint64_t lanes;
            std::memcpy(&lanes, from.planes + bit * from.plane_bytes + (from.at + i) / 8, 8);
            const __m512i value = _mm512_set1_epi8(static_cast<char>(1 << bit));
            joined = _mm512_or_si512(joined, _mm512_maskz_mov_epi8(lanes, value));
        }
        _mm512_storeu_si512(out + i, joined);
    }
#elif defined(__AVX2__)
    // Every byte gets a copy of the byte with its bit, and keeps that bit.
    const __m256i spread = _mm256_setr_epi64x(0, kEveryByte, 2 * kEveryByte, 3 * kEveryByte);
    const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    for (; from.at % 8 == 0 && i + 32 <= size; i += 32) {
        __m256i joined = _mm256_setzero_si256();
        for (unsigned bit = 0; bit < from.bits; ++bit) {
            int32_t lanes;
            std::memcpy(&lanes, from.planes + bit * from.plane_bytes + (from.at + i) / 8, 4);
            const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(lanes), spread);
            const __m256i found = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own);
            const __m256i value = _mm256_set1_epi8(static_cast<char>(1 << bit));
            joined = _mm256_or_si256(joined, _mm256_and_si256(found, value));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), joined);
    }
#endif
    for (; i < size; i += 8) {
        uint64_t bytes = 0;
        for (unsigned bit = 0; bit < from.bits; ++bit)
            bytes |= spread_bits(eight_bits(from.planes + bit * from.plane_bytes, from.at + i,
                                            from.plane_bytes))
                     << bit;
        std::memcpy(out + i, &bytes, std::min<size_t>(8, size - i));
    }
}

#if defined(__AVX2__)
// 32-bit lanes, a channel each.
#if defined(__AVX512BW__)
using Words = __m512i;
inline Words one_hot(const uint8_t* digits) {
    return _mm512_sllv_epi32(_mm512_set1_epi32(1),
                             _mm512_cvtepu8_epi32(_mm_loadu_si128(
                                 reinterpret_cast<const __m128i*>(digits))));
}
inline Words parity(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
inline Words majority(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0xe8); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words differ(Words a, Words b) { return _mm512_xor_si512(a, b); }
#else
using Words = __m256i;
inline Words one_hot(const uint8_t* digits) {
    return _mm256_sllv_epi32(_mm256_set1_epi32(1),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                                 reinterpret_cast<const __m128i*>(digits))));
}
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words differ(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words parity(Words a, Words b, Words c) { return differ(differ(a, b), c); }
inline Words majority(Words a, Words b, Words c) {
    return _mm256_or_si256(both(a, b), both(differ(a, b), c));
}
#endif

// Bit v of counts[k] of a lane: bit k of how often its digit was v. Digits beyond 31 do not count.
struct LaneCounts {
    static constexpr unsigned kBits = 9;
    Words counts[kBits]{};

    // Adds two to a bit of all counts and returns the carries.
    [[gnu::always_inline]] Words add(unsigned bit, Words a, Words b) {
        const Words carry = majority(counts[bit], a, b);
        counts[bit] = parity(counts[bit], a, b);
        return carry;
    }
    // Sixteen rows of digits.
    [[gnu::always_inline]] void add_rows(const uint8_t* digits, size_t stride) {
        Words eights[2];
#pragma GCC unroll 2
        for (Words& eight : eights) {
            Words fours[2];
#pragma GCC unroll 2
            for (Words& four : fours) {
                const Words first = add(0, one_hot(digits), one_hot(digits + stride));
                const Words second =
                    add(0, one_hot(digits + 2 * stride), one_hot(digits + 3 * stride));
                four = add(1, first, second);
                digits += 4 * stride;
            }
            eight = add(2, fours[0], fours[1]);
        }
        Words carry = add(3, eights[0], eights[1]);
#pragma GCC unroll 5
        for (unsigned bit = 4; bit < kBits; ++bit) {
            const Words next = both(counts[bit], carry);
            counts[bit] = differ(counts[bit], carry);
            carry = next;
        }
    }
};

#if defined(__AVX512BW__)
inline void add_counts(const uint8_t* each, size_t alphabet, uint32_t* counts) {
    const uint32_t there = ~uint32_t{0} >> (kMaxAlphabet - alphabet);
    for (unsigned i = 0; i < kMaxAlphabet; i += 16) {
        const auto mask = static_cast<__mmask16>(there >> i);
        const __m512i more = _mm512_cvtepu8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(each + i)));
        _mm512_mask_storeu_epi32(
            counts + i, mask,
            _mm512_add_epi32(more, _mm512_maskz_loadu_epi32(mask, counts + i)));
    }
}
#else
inline void add_counts(const uint8_t* each, size_t alphabet, uint32_t* counts) {
    for (size_t value = 0; value < alphabet; ++value) counts[value] += each[value];
}
#endif

// All values of some channels at once: a digit is a bit of 32, and bits are added with carries.
inline void count_digits(const uint8_t* digits, size_t stride, size_t tokens, size_t channels,
                         size_t alphabet, uint32_t* counts) {
    constexpr size_t kWords = sizeof(Words) / 4;
    for (size_t first = 0; first < channels; first += kWords) {
        LaneCounts lanes;
        for (size_t t = 0; t < tokens; t += 16) lanes.add_rows(digits + t * stride + first, stride);
        uint8_t each[kWords][kMaxAlphabet];
        join_planes({reinterpret_cast<const uint8_t*>(lanes.counts), sizeof(Words), 0, 8},
                    sizeof each, each[0]);
        uint32_t full[kWords];  // values that 256 tokens have
        std::memcpy(full, &lanes.counts[8], sizeof full);
        for (size_t c = 0; c < std::min(kWords, channels - first); ++c) {
            uint32_t* const of = counts + (first + c) * alphabet;
            add_counts(each[c], alphabet, of);
            const auto value = static_cast<size_t>(std::countr_zero(full[c]));
            if (value < alphabet) of[value] += 256;
        }
    }
}
#endif

// Value by value, so that the counts of a value stay in a register: a byte for each channel.
inline void count_symbols(const uint8_t* symbols, size_t stride, size_t tokens, size_t channels,
                          unsigned shift, size_t alphabet, uint32_t* counts) {
    for (size_t first = 0; first < channels; first += sizeof(Bytes)) {
        const size_t some = std::min(sizeof(Bytes), channels - first);
        Bytes rows[kCountedTokens];
        for (size_t t = 0; t < tokens; ++t) {
            rows[t] = Bytes{};
            if (some == sizeof(Bytes))
                std::memcpy(&rows[t], symbols + t * stride + first, sizeof(Bytes));
            else
                std::memcpy(&rows[t], symbols + t * stride + first, some);
            rows[t] >>= shift;
        }
#if defined(__AVX2__)
        if (alphabet <= kMaxAlphabet) {
            size_t whole = tokens;  // digits that no value has
            for (; whole % 16; ++whole) rows[whole] = Bytes{} + uint8_t{255};
            count_digits(reinterpret_cast<const uint8_t*>(rows), sizeof(Bytes), whole, some,
                         alphabet, counts + first * alphabet);
            continue;
        }
#endif
        for (size_t value = 0; value < alphabet; ++value) {
            Bytes sums{};
            const Bytes wanted = Bytes{} + static_cast<uint8_t>(value);
            uint8_t each[sizeof(Bytes)];
            for (size_t t = 0; t < tokens; ++t) {
                sums -= reinterpret_cast<Bytes>(rows[t] == wanted);
                if (t % 128 != 127 && t + 1 != tokens) continue;  // before a byte is full
                std::memcpy(each, &sums, sizeof each);
                sums = Bytes{};
                for (size_t c = 0; c < some; ++c)
                    counts[(first + c) * alphabet + value] += each[c];
            }
        }
    }
}

// Pairs of counts of each rotation, and the range of those that are not all zero.
struct CountPairs {
    uint32_t of[kRotations][kMaxAlphabet / 2];
    size_t begin = 0, end = kMaxAlphabet / 2;

    explicit CountPairs(const uint16_t* const* counts) {
        for (size_t r = 0; r < kRotations; ++r) std::memcpy(of[r], counts[r], sizeof of[r]);
        const auto empty = [&](size_t pair) { return !(of[0][pair] | of[1][pair] | of[2][pair]); };
        while (begin < end && empty(begin)) ++begin;  // values that occur stand together
        while (begin < end && empty(end - 1)) --end;
    }
};

#if defined(__AVX512BW__)
// Sums of so many registers of 16 classes from class `first` on, for all rotations.
template <size_t kRegisters>
inline void class_bits_of(const CountPairs& pairs, const int16_t* costs, size_t classes,
                          size_t first, uint32_t* bits) {
    __m512i sums[kRotations][kRegisters];
#pragma GCC unroll 3
    for (auto& of : sums)
#pragma GCC unroll 8
        for (__m512i& sum : of) sum = _mm512_setzero_si512();
    for (size_t pair = pairs.begin; pair < pairs.end; ++pair) {
        const int16_t* const row = costs + 2 * (pair * classes + first);
        __m512i times[kRotations];
#pragma GCC unroll 3
        for (size_t r = 0; r < kRotations; ++r)
            times[r] = _mm512_set1_epi32(static_cast<int>(pairs.of[r][pair]));
#pragma GCC unroll 8
        for (size_t i = 0; i < kRegisters; ++i) {
            const __m512i cost = _mm512_loadu_si512(row + 32 * i);
#pragma GCC unroll 3
            for (size_t r = 0; r < kRotations; ++r)
                sums[r][i] = _mm512_dpwssd_epi32(sums[r][i], times[r], cost);
        }
    }
#pragma GCC unroll 3
    for (size_t r = 0; r < kRotations; ++r)
#pragma GCC unroll 8
        for (size_t i = 0; i < kRegisters; ++i)
            _mm512_storeu_si512(bits + r * classes + first + 16 * i, sums[r][i]);
}

inline size_t class_bits(const CountPairs& pairs, const int16_t* costs, size_t classes,
                         uint32_t* bits) {
    size_t c = 0;
    for (; c + 112 <= classes; c += 112) class_bits_of<7>(pairs, costs, classes, c, bits);
    for (; c + 16 <= classes; c += 16) class_bits_of<1>(pairs, costs, classes, c, bits);
    return c;
}
#elif defined(__AVX2__)
template <size_t kRegisters>
inline void class_bits_of(const uint32_t* pairs, size_t begin, size_t end, const int16_t* costs,
                          size_t classes, size_t first, uint32_t* bits) {
    __m256i sums[kRegisters];
#pragma GCC unroll 8
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    for (size_t pair = begin; pair < end; ++pair) {
        const __m256i times = _mm256_set1_epi32(static_cast<int>(pairs[pair]));
        const int16_t* const row = costs + 2 * (pair * classes + first);
#pragma GCC unroll 8
        for (size_t i = 0; i < kRegisters; ++i)
            sums[i] = _mm256_add_epi32(
                sums[i], _mm256_madd_epi16(times, _mm256_loadu_si256(
                                                      reinterpret_cast<const __m256i*>(row + 16 * i))));
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < kRegisters; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + first + 8 * i), sums[i]);
}

inline size_t class_bits(const CountPairs& pairs, const int16_t* costs, size_t classes,
                         uint32_t* bits) {
    size_t c = 0;
    for (; c + 56 <= classes; c += 56)
        for (size_t r = 0; r < kRotations; ++r)
            class_bits_of<7>(pairs.of[r], pairs.begin, pairs.end, costs, classes, c,
                             bits + r * classes);
    for (; c + 8 <= classes; c += 8)
        for (size_t r = 0; r < kRotations; ++r)
            class_bits_of<1>(pairs.of[r], pairs.begin, pairs.end, costs, classes, c,
                             bits + r * classes);
    return c;
}
#else
inline size_t class_bits(const CountPairs&, const int16_t*, size_t, uint32_t*) { return 0; }
#endif

// The first of the least numbers.
inline size_t first_least(const uint32_t* numbers, size_t size) {
    size_t at = 0;
#if defined(__AVX512BW__)
    __m512i sixteen = _mm512_set1_epi32(-1);
    for (; at + 16 <= size; at += 16)
        sixteen = _mm512_min_epu32(sixteen, _mm512_loadu_si512(numbers + at));
    uint32_t least = _mm512_reduce_min_epu32(sixteen);
    for (; at < size; ++at) least = std::min(least, numbers[at]);
    const __m512i wanted = _mm512_set1_epi32(static_cast<int>(least));
    for (at = 0; at + 16 <= size; at += 16)
        if (const __mmask16 found =
                _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(numbers + at), wanted))
            return at + static_cast<size_t>(std::countr_zero(found));
#elif defined(__AVX2__)
    __m256i eight = _mm256_set1_epi32(-1);
    const auto load = [&](size_t from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers + from));
    };
    for (; at + 8 <= size; at += 8) eight = _mm256_min_epu32(eight, load(at));
    uint32_t each[8];
    std::memcpy(each, &eight, sizeof each);
    uint32_t least = *std::min_element(each, each + 8);
    for (; at < size; ++at) least = std::min(least, numbers[at]);
    const __m256i wanted = _mm256_set1_epi32(static_cast<int>(least));
    for (at = 0; at + 8 <= size; at += 8)
        if (const auto found = static_cast<unsigned>(
                _mm256_movemask_epi8(_mm256_cmpeq_epi32(load(at), wanted))))
            return at + static_cast<size_t>(std::countr_zero(found)) / 4;
#else
    const uint32_t least = *std::min_element(numbers, numbers + size);
#endif
    while (numbers[at] != least) ++at;
    return at;
}

inline size_t best_class(const uint16_t* const* counts, const int16_t* costs, size_t classes,
                         uint32_t* __restrict bits) {
    const CountPairs pairs(counts);
    const size_t done = class_bits(pairs, costs, classes, bits);
    for (size_t r = 0; r < kRotations && done < classes; ++r) {
        uint32_t* const of = bits + r * classes;
        std::fill(of + done, of + classes, 0u);
        for (size_t pair = pairs.begin; pair < pairs.end; ++pair) {
            const uint32_t first = counts[r][2 * pair], second = counts[r][2 * pair + 1];
            for (size_t at = done; at < classes; ++at) {
                const int16_t* const both = costs + 2 * (pair * classes + at);
                of[at] += first * static_cast<uint32_t>(both[0]) +
                          second * static_cast<uint32_t>(both[1]);
            }
        }
    }
    return first_least(bits, kRotations * classes);
}

}  // namespace
}  // namespace cachegen
