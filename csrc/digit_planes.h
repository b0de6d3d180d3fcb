// Symbols of a matrix as high digits and bit planes of low ones, for codecs that store low digits raw.
#pragma once

#include <cstdint>
#include <span>

#include "channel_models.h"

namespace cachegen {

// Subtracts rotation << bits from the symbols of each channel, modulo 32 << bits, and parts what
// they become: high digits, a matrix, and the `bits` (1 to 3) low ones as planes of
// ceil(tokens * channels / 8) bytes, lowest first.
void split_digits(const SymbolMatrix& matrix, std::span<const uint8_t> rotations, unsigned bits,
                  uint8_t* high, uint8_t* planes);

}  // namespace cachegen
