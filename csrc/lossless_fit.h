// The tables of a plane of `lossless`, and which of them each channel has.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lossless.h"

namespace cachegen {

struct LosslessFit {
    std::vector<uint16_t> freqs;   // rows of 32
    std::vector<uint8_t> classes;  // the row of each channel
};

// Chooses 1 to 16 tables by the bits they take in all. counts: a row of 32 for each channel.
LosslessFit fit_lossless(std::span<const uint32_t> counts, const LosslessCosts& costs);

}  // namespace cachegen
