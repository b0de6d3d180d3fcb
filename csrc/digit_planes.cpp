#include "digit_planes.h"

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

// One token: as bytes that compilers work on side by side.
template <unsigned kBits>
void split_row(const uint8_t* __restrict symbols, const uint8_t* __restrict offsets, size_t size,
               uint8_t* __restrict high, uint8_t* __restrict low) {
    for (size_t c = 0; c < size; ++c) {
        const auto rotated = static_cast<uint8_t>(symbols[c] - offsets[c]);
        constexpr unsigned mask = (kMaxAlphabet << kBits) - 1;
        high[c] = static_cast<uint8_t>((rotated & mask) >> kBits);
        low[c] = static_cast<uint8_t>(rotated & ((1u << kBits) - 1));
    }
}

}  // namespace

void split_digits(const SymbolMatrix& matrix, std::span<const uint8_t> rotations, unsigned bits,
                  uint8_t* high, uint8_t* planes) {
    const size_t size = matrix.tokens * matrix.channels, plane_bytes = ceil_div(size, 8);
    std::vector<uint8_t> offsets(matrix.channels), low(size + kAtOnce);
    for (size_t c = 0; c < matrix.channels; ++c)
        offsets[c] = static_cast<uint8_t>(rotations[c] << bits);
    const auto split = bits == 1 ? split_row<1> : bits == 2 ? split_row<2> : split_row<3>;
    for (size_t token = 0; token < matrix.tokens; ++token) {
        const size_t at = token * matrix.channels;
        split(matrix.symbols + at, offsets.data(), matrix.channels, high + at, low.data() + at);
    }
    for (unsigned bit = 0; bit < bits; ++bit, planes += plane_bytes)
        for (size_t at = 0; at < size; at += kAtOnce) {
            const unsigned both = bits_of(&low[at], bit);
            const uint8_t bytes[2] = {static_cast<uint8_t>(both), static_cast<uint8_t>(both >> 8)};
            if (at / 8 + 2 <= plane_bytes)
                std::memcpy(planes + at / 8, bytes, sizeof bytes);
            else
                planes[at / 8] = bytes[0];
        }
}

}  // namespace cachegen
