// A first pass that is nearly all 0 (FORMAT.md, "Sparse segment body"). The host parses and writes
// such bodies; here they are pairs of numbers: the place, 32 * step + lane, and the symbol.
#pragma once

#include "plan.cuh"

namespace cachegen {

// A warp's way through the pairs of its steps, which are in order of place. Behind the last one of a
// segment stands one with a place beyond all others.
struct SparseReader {
    const uint2* next;
    uint2 pair;

    // first: address of the first pair that is not before the warp's first step.
    CACHEGEN_DEVICE void open(uint64_t first) {
        next = at_address<const uint2>(first);
        pair = *next;
    }

    // Returns the symbols of a lane in the eight steps from `step` on or fewer, eight bits each. Mostly
    // none of the warp has one, and nothing is read.
    CACHEGEN_DEVICE uint64_t take(uint32_t step, unsigned steps, unsigned lane) {
        uint64_t symbols = 0;
        while (pair.x / kLanes < step + steps) {
            const unsigned at = 8 * (pair.x / kLanes - step);
            if (pair.x % kLanes == lane) symbols |= static_cast<uint64_t>(pair.y) << at;
            pair = *++next;
        }
        return symbols;
    }
};

}  // namespace cachegen
