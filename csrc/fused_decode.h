// Fused decoding of the `progressive` codec: all passes of a group from bytes to K and V in the
// caller's memory, block by block through the first-level cache. docs/fused-decode.md derives it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "alias_table.h"
#include "float_bits.h"
#include "ladder.h"

namespace cachegen {

inline constexpr int64_t kSkippedToken = INT64_MIN;

// RoPE of one kind of layers for the tokens of a chunk: cos and sin times the attention scale.
struct RopeKind {
    std::vector<float> frequencies;
    float scale;
    bool interleaved;
};

// Where one plane goes: token t, head h at data + offsets[t] + h * head_stride, `dim` elements side
// by side; nowhere if offsets[t] is kSkippedToken.
struct PlaneTarget {
    std::byte* data;
    const int64_t* offsets;  // bytes, one per token of the group
    int64_t head_stride;     // bytes
    uint32_t heads, dim;
    int rope;                // index of a kind, or -1
    int64_t first_position;  // of token 0
    bool is_value;
};

enum class PassKind : uint8_t { Rans, Bytes, Packed };

struct PassBody {
    PassKind kind;
    std::span<const uint8_t> bytes;
};

// What a group's bytes decode to, beside them. Views; the caller keeps them alive.
struct FusedGroup {
    uint64_t tokens, channels;
    std::vector<PassBody> passes;      // those at hand, at least pass 0
    std::span<const uint8_t> classes;  // family * kClasses + class of each channel
    Scaling key_scaling, value_scaling;
    // In units of the scaled values: offsets by class, means by channel or none.
    std::span<const float> early_offset, late_offset;  // kClasses each, times the scale of K
    std::span<const float> mean;
    float value_factor;  // V is divided by its weight, so offsets and means of V are times this
    std::span<const uint32_t> exempt_tokens;  // ascending, below tokens
    const std::byte* exempt_rows;             // one row of channels for each
    std::vector<PlaneTarget> planes;          // in channel order
};

inline constexpr unsigned kClasses = 64, kFamilies = 3, kTableRows = 88;

struct FusedDecode {
    KVType type;
    unsigned passes;  // of the whole object
    const Tables& coarse;  // kFamilies * kTableRows models
    const Tables& refine;  // twice as many: one for each context
    std::vector<RopeKind> ropes;
    std::vector<FusedGroup> groups;
};

// Throws Error: Truncated or Corrupt for bytes, Geometry for sizes that contradict one another.
// After an error the targets hold anything. Memory: see docs/fused-decode.md.
void decode_groups(const FusedDecode& work);

}  // namespace cachegen
