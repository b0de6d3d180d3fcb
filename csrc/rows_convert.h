// Rows of K or V from one element type to another, and sums of two rows.
#pragma once

#include <cstddef>

#include "float_bits.h"

namespace cachegen {

// Rounds to nearest even; finite values to the finite range of float16. size: of values.
void convert_row(KVType from, const std::byte* values, KVType to, std::byte* out, size_t size);

// values += others, each sum rounded to the type.
void add_rows(KVType type, const std::byte* others, std::byte* values, size_t size);

}  // namespace cachegen
