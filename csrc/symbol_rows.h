// Rows of symbols between the entropy coder and the quantiser, as plain C++ for the compiler to
// vectorise; see quantize_rows.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "bit_planes.h"
#include "dispatch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
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

// A row of a block. Compilers make of it what the instruction set has.
using LaneBytes [[gnu::vector_size(kLanes)]] = uint8_t;

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

inline unsigned largest_symbol(const uint8_t* symbols, size_t size) {
    uint8_t largest = 0;
    for (size_t i = 0; i < size; ++i) largest = std::max(largest, symbols[i]);
    return largest;
}

// Digits of a block, of 32 lanes each step: (digit + offset) modulo 32. Returns the largest of the
// active lanes; idle ones become anything.
inline unsigned rotate_block(const uint8_t* offsets, size_t steps, unsigned lanes,
                             uint8_t* __restrict block) {
    LaneBytes most{};
    for (size_t step = 0; step < steps; ++step) {
        LaneBytes row;
        std::memcpy(&row, block + step * kLanes, kLanes);
        row = (row + offsets[step]) & 31;
        std::memcpy(block + step * kLanes, &row, kLanes);
        most = row > most ? row : most;
    }
    uint8_t each[kLanes];
    std::memcpy(each, &most, kLanes);
    return *std::max_element(each, each + lanes);
}

// Puts low digits behind each symbol. Returns the largest.
inline unsigned add_low_digits(const PackedRow& low, unsigned bits, unsigned centre, size_t size,
                               uint8_t* __restrict symbols) {
    alignas(64) uint8_t digits[kBlockSteps];
    if (low.planes)
        join_planes(low, size, digits);
    else
        std::memset(digits, static_cast<int>(centre), sizeof digits);
    uint8_t largest = 0;
    for (size_t i = 0; i < size; ++i) {
        symbols[i] = static_cast<uint8_t>(symbols[i] << bits | digits[i]);
        largest = std::max(largest, symbols[i]);
    }
    return largest;
}

// Value by value, so that the counts of a value stay in a register: a byte for each channel.
inline void count_symbols(const uint8_t* symbols, size_t stride, size_t tokens, size_t channels,
                          unsigned shift, size_t alphabet, uint32_t* counts) {
    for (size_t first = 0; first < channels; first += sizeof(Bytes)) {
        const size_t some = std::min(sizeof(Bytes), channels - first);
        Bytes rows[kCountedTokens];
        for (size_t t = 0; t < tokens; ++t) {
            rows[t] = Bytes{};
            std::memcpy(&rows[t], symbols + t * stride + first, some);
            rows[t] >>= shift;
        }
        for (size_t value = 0; value < alphabet; ++value) {
            Bytes sums{};
            const Bytes wanted = Bytes{} + static_cast<uint8_t>(value);
            for (size_t t = 0; t < tokens; ++t)
                sums -= reinterpret_cast<Bytes>(rows[t] == wanted);
            uint8_t each[sizeof(Bytes)];
            std::memcpy(each, &sums, sizeof each);
            for (size_t c = 0; c < some; ++c) counts[(first + c) * alphabet + value] += each[c];
        }
    }
}

#if defined(__AVX2__)
// So many registers of 8 classes each, from class `first` on. pairs: of counts, from `begin` to `end`.
template <size_t kRegisters>
inline void class_bits_of(const uint32_t* pairs, size_t begin, size_t end, const int16_t* costs,
                          size_t classes, size_t first, uint32_t* bits,
                          __m256i& least) {
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
    for (size_t i = 0; i < kRegisters; ++i) {
        least = _mm256_min_epu32(least, sums[i]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + first + 8 * i), sums[i]);
    }
}
#endif

inline uint32_t class_bits(const uint16_t* counts, const int16_t* costs, size_t classes,
                           uint32_t* __restrict bits) {
    uint32_t pairs[16];  // of counts
    std::memcpy(pairs, counts, sizeof pairs);
    size_t begin = 0, end = 16, c = 0;  // values that occur stand together
    while (begin < end && !pairs[begin]) ++begin;
    while (begin < end && !pairs[end - 1]) --end;
    uint32_t least = ~uint32_t{0};
#if defined(__AVX2__)
    __m256i eight = _mm256_set1_epi32(-1);
    for (; c + 56 <= classes; c += 56)
        class_bits_of<7>(pairs, begin, end, costs, classes, c, bits, eight);
    for (; c + 8 <= classes; c += 8)
        class_bits_of<1>(pairs, begin, end, costs, classes, c, bits, eight);
    uint32_t each[8];
    std::memcpy(each, &eight, sizeof each);
    for (const uint32_t one : each) least = std::min(least, one);
#endif
    std::fill(bits + c, bits + classes, 0u);
    for (size_t pair = begin; pair < end; ++pair) {
        const uint32_t first = counts[2 * pair], second = counts[2 * pair + 1];
        for (size_t at = c; at < classes; ++at) {
            const int16_t* const both = costs + 2 * (pair * classes + at);
            bits[at] += first * static_cast<uint32_t>(both[0]) +
                        second * static_cast<uint32_t>(both[1]);
        }
    }
    for (; c < classes; ++c) least = std::min(least, bits[c]);
    return least;
}

// Bit `bit` of `size` bytes to the plane `bit`, for all of them.
inline void split_planes(const uint8_t* bytes, size_t size, unsigned bits, size_t plane_bytes,
                         uint8_t* planes) {
    size_t i = 0;
    // Bits are moved to the top of each byte; what comes from the byte below is not looked at.
#if defined(__AVX512BW__)
    for (; i + 64 <= size; i += 64) {
        const __m512i row = _mm512_loadu_si512(bytes + i);
        for (unsigned bit = 0; bit < bits; ++bit) {
            const uint64_t found = _mm512_test_epi8_mask(row, _mm512_set1_epi8(static_cast<char>(1 << bit)));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 8);
        }
    }
#elif defined(__AVX2__)
    for (; i + 32 <= size; i += 32) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
        for (unsigned bit = 0; bit < bits; ++bit) {
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(7 - bit));
            const int found = _mm256_movemask_epi8(_mm256_sll_epi16(row, shift));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 4);
        }
    }
#elif defined(__SSE2__)
    for (; i + 16 <= size; i += 16) {
        const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
        for (unsigned bit = 0; bit < bits; ++bit) {
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(7 - bit));
            const auto found = static_cast<uint16_t>(_mm_movemask_epi8(_mm_sll_epi16(row, shift)));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 2);
        }
    }
#endif
    for (; i < size; i += 8) {
        uint64_t eight = 0;
        std::memcpy(&eight, bytes + i, std::min<size_t>(8, size - i));
        for (unsigned bit = 0; bit < bits; ++bit)
            planes[bit * plane_bytes + i / 8] = static_cast<uint8_t>(collect_bits(eight >> bit));
    }
}

// Past the caches, where whole lines go: nothing of the old contents is needed.
inline void stream_row(const std::byte* from, size_t bytes, std::byte* to) {
    size_t at = 0;
#if defined(__AVX512BW__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (; at + 64 <= bytes; at += 64)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX2__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0)
        for (; at < bytes; at += 32)
            _mm256_stream_si256(
                reinterpret_cast<__m256i*>(to + at),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
#endif
    std::memcpy(to + at, from + at, bytes - at);
}

constexpr SymbolRows symbol_rows() {
    return {join_planes,   largest_symbol, rotate_block, add_low_digits,
            count_symbols, class_bits,     stream_row,   split_planes};
}

}  // namespace
}  // namespace cachegen
