// Values of the `progressive` codec between digits and floats (docs/fused-decode.md).
//
// A value is one signed 16-bit number, v, for any number of passes decoded so far, k + 1 of them:
//     0                  zero so far
//     |v| >= 3^k         significant since pass 0: its cell is |v| - 0.4 * 3^k, one step wide
//     0 < |v| < 3^k      significant since a later pass: its cell is 0.6 |v| - 0.6, 1.2 wide
// in units of the step of the last pass decoded. A refining digit d makes 3 v + d, away from zero,
// or 3 v + 2 d for a late value; where v is 0, d - 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_bits.h"

namespace cachegen {

inline constexpr unsigned kMaxPasses = 6;
inline constexpr unsigned kMaxCoarse = 127;

inline constexpr int power_of_three(unsigned exponent) {
    return exponent == 0 ? 1 : 3 * power_of_three(exponent - 1);
}
static_assert((kMaxCoarse + 1) * power_of_three(kMaxPasses - 1) <= 32767, "values are 16 bits");

// What turns the values of a group into floats.
struct Scaling {
    int late_below;                  // 3^k
    float early_scale, late_scale;   // value = v * scale + sign(v) * offset + mean
};

// What values from -16 to 15 become, as a row that a permutation looks up by the low five bits of a
// value: elements of the destination, or with RoPE floats.
inline constexpr int16_t kLookup[32] = {0,   1,   2,   3,   4,   5,   6,  7,  8,  9,  10,
                                        11,  12,  13,  14,  15,  -16, -15, -14, -13, -12, -11,
                                        -10, -9,  -8,  -7,  -6,  -5, -4, -3, -2, -1};

// One head at one place: `size` rows of kLanes values to one row of `size` floats for each lane.
struct UnitJob {
    const int16_t* values;
    size_t size;
    Scaling scaling;
    const float *early_offset, *late_offset, *mean;  // one per row
    const float *cos, *sin;  // rows of kLanes for each of `half` pairs; null without RoPE
    size_t half;
    bool interleaved;        // pairs are neighbours, else `half` rows apart
    const void* lookup;      // one row per row of values, or null; see kLookup
    std::byte* const* rows;  // where the head of each lane's token goes; null: nowhere
    void* scratch;           // size rounded up to 64 rows of kLanes elements, aligned to 64 bytes
};

// The float of a value of one channel, before RoPE.
inline float scale_value(const UnitJob& job, size_t row, int32_t value) {
    const int32_t minus = value >> 31;
    const bool late = ((value ^ minus) - minus) < job.scaling.late_below;
    const uint32_t scale = select(late, bits_from_float(job.scaling.late_scale),
                                  bits_from_float(job.scaling.early_scale));
    const uint32_t offset = select(late, bits_from_float(job.late_offset[row]),
                                   bits_from_float(job.early_offset[row]));
    const uint32_t moved = select(value == 0, 0, offset) ^
                           (static_cast<uint32_t>(minus) & 0x80000000u);
    return static_cast<float>(value) * float_from_bits(scale) + float_from_bits(moved) +
           job.mean[row];
}

// A head's means, turned by RoPE for every lane: rows of elements.
struct MeansJob {
    const float* mean;  // `size` of them
    size_t size;
    const float* angles;  // for each lane `half` cos and then as many sin
    size_t half;
    bool interleaved;
    uint32_t lanes;           // bit l: lane l is wanted
    std::byte* const* rows;   // of every lane
    uint32_t is_read_again;   // by lane; rows of others may go past the caches
};

// Rows of floats, one per token, to their destination: (row + mean) * factor, RoPE, rounding.
struct RowsJob {
    const float* values;  // size floats, row_stride apart
    size_t row_stride;    // floats
    size_t size;          // of a head
    const float* mean;    // size floats
    float factor;
    const float *cos, *sin;  // `half` floats for the row; null without RoPE
    size_t half;
    bool interleaved;
    void* row;  // where it goes
};

}  // namespace cachegen
