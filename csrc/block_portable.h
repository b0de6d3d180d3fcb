// Blocks to matrix rows and back, one byte at a time, for backends without anything better.
#pragma once

#include <cstring>

#include "dispatch.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

void scatter(const uint8_t* block, size_t steps, uint8_t* first_row, size_t stride,
             unsigned lanes) {
    for (unsigned lane = 0; lane < lanes; ++lane)
        for (size_t step = 0; step < steps; ++step)
            first_row[lane * stride + step] = block[step * kLanes + lane];
}

void gather(const uint8_t* first_row, size_t stride, unsigned lanes, size_t steps,
            uint8_t* block) {
    if (lanes < kLanes) std::memset(block, 0, steps * kLanes);
    for (unsigned lane = 0; lane < lanes; ++lane)
        for (size_t step = 0; step < steps; ++step)
            block[step * kLanes + lane] = first_row[lane * stride + step];
}

}  // namespace
}  // namespace cachegen
