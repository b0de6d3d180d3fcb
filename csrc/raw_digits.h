// The raw low digits of one decoded step (FORMAT.md, "Digit shift").
#pragma once

#include <algorithm>
#include <cstdint>

#include "bit_planes.h"
#include "block.h"
#include "stream_reader.h"

namespace cachegen {

// Shifts the values of the active lanes up and fills in the low bits that come next in the stream.
// values: kLanes of them, of this step, which is for messages.
inline void add_raw_digits(StreamReader& reader, uint8_t* values, unsigned shift, unsigned lanes,
                           uint64_t step) {
    uint32_t planes[kMaxShift];
    reader.next_planes(planes, shift);
    std::fill(values + lanes, values + kLanes, uint8_t{0});
    uint64_t any = 0;
    for (unsigned bit = 0; bit < shift; ++bit) any |= planes[bit];
    if (any >> lanes) reader.refuse("raw bit of an idle lane", "1", "0");
    const unsigned largest = largest_of({values, kLanes});
    if (largest > kMaxSymbol >> shift) reader.refuse_symbol(step, largest << shift);
    join_low_bits(values, shift, planes);
}

}  // namespace cachegen
