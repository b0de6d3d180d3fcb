#include "digit_planes.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bit_planes.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace cachegen {
namespace {

constexpr size_t kAtOnce = 16;

// Bit `bit` of 16 bytes.
unsigned bits_of(const uint8_t* bytes, unsigned bit) {
#if defined(__SSE2__)
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    // Moved to the top of each byte; what comes from the byte below is not looked at.
    return static_cast<unsigned>(
        _mm_movemask_epi8(_mm_sll_epi16(row, _mm_cvtsi32_si128(static_cast<int>(7 - bit)))));
#else
    uint64_t half[2];
    std::memcpy(half, bytes, sizeof half);
    return static_cast<unsigned>(collect_bits(half[0] >> bit) | collect_bits(half[1] >> bit) << 8);
#endif
}

}  // namespace

void split_digits(const SymbolMatrix& matrix, std::span<const uint8_t> rotations, unsigned bits,
                  uint8_t* high, uint8_t* planes) {
    const size_t size = matrix.tokens * matrix.channels, plane_bytes = ceil_div(size, 8);
    const auto mask = static_cast<uint8_t>((kMaxAlphabet << bits) - 1);
    std::vector<uint8_t> offsets(matrix.channels), low(size + kAtOnce);
    for (size_t c = 0; c < matrix.channels; ++c)
        offsets[c] = static_cast<uint8_t>(rotations[c] << bits);
    const uint8_t* symbols = matrix.symbols;
    uint8_t* to_low = low.data();
    const auto low_mask = static_cast<uint8_t>((1u << bits) - 1);
    for (size_t token = 0; token < matrix.tokens; ++token) {
        for (size_t c = 0; c < matrix.channels; ++c) {
            const auto rotated = static_cast<uint8_t>((symbols[c] - offsets[c]) & mask);
            high[c] = static_cast<uint8_t>(rotated >> bits);
            to_low[c] = static_cast<uint8_t>(rotated & low_mask);
        }
        symbols += matrix.channels, high += matrix.channels, to_low += matrix.channels;
    }
    for (unsigned bit = 0; bit < bits; ++bit, planes += plane_bytes)
        for (size_t at = 0; at < size; at += kAtOnce) {
            const unsigned both = bits_of(&low[at], bit);
            planes[at / 8] = static_cast<uint8_t>(both);
            if (at / 8 + 1 < plane_bytes) planes[at / 8 + 1] = static_cast<uint8_t>(both >> 8);
        }
}

}  // namespace cachegen
