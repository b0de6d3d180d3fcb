// Rows of symbols between the entropy coder and the quantiser, as plain C++ for the compiler to
// vectorise; see quantize_rows.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "bit_planes.h"
#include "channel_rows.h"
#include "dispatch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

// A row of a block. Compilers make of it what the instruction set has.
using LaneBytes [[gnu::vector_size(kLanes)]] = uint8_t;

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

inline void turn_block(const uint8_t* offsets, unsigned bits, size_t steps,
                       uint8_t* __restrict block) {
    for (size_t step = 0; step < steps; ++step) {
        LaneBytes row;
        std::memcpy(&row, block + step * kLanes, kLanes);
        row = ((row >> bits) + offsets[step]) & 31;
        std::memcpy(block + step * kLanes, &row, kLanes);
    }
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

// Bits [first, first + count) of `size` bytes, each to a plane.
inline void split_planes(const uint8_t* bytes, size_t size, unsigned first, unsigned count,
                         size_t plane_bytes, uint8_t* planes) {
    size_t i = 0;
    // Bits are moved to the top of each byte; what comes from the byte below is not looked at.
#if defined(__AVX512BW__)
    for (; i + 64 <= size; i += 64) {
        const __m512i row = _mm512_loadu_si512(bytes + i);
        for (unsigned bit = 0; bit < count; ++bit) {
            const uint64_t found = _mm512_test_epi8_mask(row, _mm512_set1_epi8(static_cast<char>(1 << (first + bit))));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 8);
        }
    }
#elif defined(__AVX2__)
    for (; i + 32 <= size; i += 32) {
        const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
        for (unsigned bit = 0; bit < count; ++bit) {
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(7 - first - bit));
            const int found = _mm256_movemask_epi8(_mm256_sll_epi16(row, shift));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 4);
        }
    }
#elif defined(__SSE2__)
    for (; i + 16 <= size; i += 16) {
        const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
        for (unsigned bit = 0; bit < count; ++bit) {
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(7 - first - bit));
            const auto found = static_cast<uint16_t>(_mm_movemask_epi8(_mm_sll_epi16(row, shift)));
            std::memcpy(planes + bit * plane_bytes + i / 8, &found, 2);
        }
    }
#endif
    for (; i < size; i += 8) {
        uint64_t eight = 0;
        std::memcpy(&eight, bytes + i, std::min<size_t>(8, size - i));
        for (unsigned bit = 0; bit < count; ++bit)
            planes[bit * plane_bytes + i / 8] = static_cast<uint8_t>(collect_bits(eight >> (first + bit)));
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
    return {join_planes,   largest_symbol, rotate_block, turn_block,  add_low_digits,
            count_symbols, best_class,     stream_row,   split_planes};
}

}  // namespace
}  // namespace cachegen
