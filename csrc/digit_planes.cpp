#include "digit_planes.h"

#include <vector>

#include "dispatch.h"

namespace cachegen {
namespace {

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
    std::vector<uint8_t> offsets(matrix.channels), low(size);
    for (size_t c = 0; c < matrix.channels; ++c)
        offsets[c] = static_cast<uint8_t>(rotations[c] << bits);
    const auto split = bits == 1 ? split_row<1> : bits == 2 ? split_row<2> : split_row<3>;
    for (size_t token = 0; token < matrix.tokens; ++token) {
        const size_t at = token * matrix.channels;
        split(matrix.symbols + at, offsets.data(), matrix.channels, high + at, low.data() + at);
    }
    kernels().symbol_rows.split_planes(low.data(), size, bits, plane_bytes, planes);
}

}  // namespace cachegen
