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

// 64 symbols at a time.
inline void pack_bits(const uint8_t* symbols, size_t size, unsigned first, unsigned count,
                      uint8_t* planes, size_t plane_bytes) {
    for (size_t at = 0; at < size; at += 64) {
        for (unsigned bit = 0; bit < count; ++bit) {
            uint64_t bits = 0;
#if defined(__AVX512BW__)
            bits = _mm512_test_epi8_mask(_mm512_loadu_si512(symbols + at),
                                         _mm512_set1_epi8(static_cast<char>(1 << (first + bit))));
#elif defined(__AVX2__)
            const auto half = [&](size_t from) {
                const __m256i row = _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(symbols + from));
                return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(
                    row, _mm_cvtsi32_si128(static_cast<int>(7 - first - bit)))));
            };
            bits = half(at) | uint64_t{half(at + 32)} << 32;
#else
            for (unsigned i = 0; i < 64; i += 8) {
                uint64_t eight;
                std::memcpy(&eight, symbols + at + i, sizeof eight);
                bits |= collect_bits(eight >> (first + bit)) << i;
            }
#endif
            std::memcpy(planes + bit * plane_bytes + at / 8, &bits, sizeof bits);
        }
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
    return {join_planes,    largest_symbol, rotate_block, turn_block, pack_bits,
            add_low_digits, count_symbols,  best_class,   stream_row};
}

}  // namespace
}  // namespace cachegen
