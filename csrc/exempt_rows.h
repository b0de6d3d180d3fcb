// Rows that an object stores as they are, on their way to another element type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_bits.h"

namespace cachegen {

// Exempt rows of one head, to another element type if need be; float16 to its finite range.
void convert_exempt(const uint8_t* from, KVType stored, std::byte* to, KVType type, size_t size);

}  // namespace cachegen
