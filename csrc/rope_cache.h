// cos and sin for all tokens of a chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format.h"
#include "fused_decode.h"

namespace cachegen {

// The angles of a whole chunk, shared by its layers; a long chunk has them made place by place.
class RopeCache {
public:
    static constexpr size_t kMostFloats = size_t{1} << 18;  // 1 MiB

    // lanes: of Kernels::angle_lanes.
    RopeCache(const std::vector<RopeKind>& kinds, const uint8_t* lanes)
        : kinds_(kinds), lanes_(lanes) {}

    // Makes the table of a target, if it is small enough to be kept. Not to be called by threads.
    void prepare(const PlaneTarget& target, const Shape& shape);

    // cos of a place, rows of lanes, with sin behind it, and both once more as `by_token` says; made
    // in `scratch` if the table is not kept.
    const float* angles(const PlaneTarget& target, const Shape& shape, uint64_t place,
                        std::vector<float>& scratch) const;

    // In what `angles` returned: for each lane `half` cos and then as many sin.
    static const float* by_token(const float* angles, size_t half) {
        return angles ? angles + 2 * half * kLanes : nullptr;
    }

    const RopeKind& kind(int index) const { return kinds_[static_cast<size_t>(index)]; }

private:
    struct Entry {
        int rope;
        int64_t first_position;
        uint64_t tokens;
        std::vector<float> angles;
    };
    const Entry* find(const PlaneTarget& target, const Shape& shape) const;

    const std::vector<RopeKind>& kinds_;
    const uint8_t* lanes_;
    std::vector<Entry> entries_;
    size_t floats_ = 0;
};

}  // namespace cachegen
