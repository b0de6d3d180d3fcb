// Heads whose values are nearly all 0. Every token gets the row of means, which RoPE turns, changed
// where a value is not 0: row by row, so that nothing has to be transposed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dispatch.h"

namespace cachegen {

// A value that is not 0, of one lane in one row of a unit.
struct FewValue {
    uint32_t row;
    uint8_t lane;
    int16_t value;
};

// Does what Kernels::finish_unit does, for values that are 0 but for `few`; job.values is not read.
// angles: with RoPE, job.half cos and as many sin for each lane, one lane after the other.
void finish_means(const Kernels& kernel, KVType type, const UnitJob& job,
                  std::span<const FewValue> few, const float* angles);

}  // namespace cachegen
