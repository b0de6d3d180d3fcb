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

enum class PassKind : uint8_t { Rans, Bytes, Packed, Sparse };

struct PassBody {
    PassKind kind;
    std::span<const uint8_t> bytes;
};

// The side information of a group (FORMAT.md, `progressive`), checked; views of its bytes.
struct GroupSide {
    unsigned decay;  // in 1/64
    int class_offset;
    float mean_scale;
    std::span<const uint8_t> classes;    // family * kClasses + class; empty with a profile
    std::span<const uint8_t> mean;       // int8 levels, empty without a mean
    std::span<const uint8_t> exempt;     // token numbers, 4 bytes each
    std::span<const uint8_t> rows;       // of exempt tokens, all channels each
    uint32_t exempt_count() const { return static_cast<uint32_t>(exempt.size() / 4); }
    uint32_t exempt_token(size_t index) const;
};

// plain: without a profile. Throws Error (Corrupt).
GroupSide parse_side(std::span<const uint8_t> bytes, uint64_t tokens, uint64_t channels,
                     KVType stored, bool plain);

// Where the components of a group go, for a transform to follow: as floats, or as values.
struct ComponentTarget {
    float* floats;  // a row of places * 32 for each component, places after one another
    uint8_t* used;  // whether a component is anything but 0 somewhere
    // Instead of both: places * channels rows of kLanes values, aligned to a cache line; those of
    // lanes without a token are anything.
    int16_t* values;
};

// What a group's bytes decode to, beside them. Views; the caller keeps them alive.
struct FusedGroup {
    uint64_t tokens, channels;
    std::vector<PassBody> passes;  // those at hand, at least pass 0
    GroupSide side;
    Scaling key_scaling, value_scaling;
    // By class, kClasses each, in units of K: see UnitJob.
    std::span<const float> early_offset, late_offset;
    float value_factor;  // V is divided by its weight, so offsets and means of V are times this
    std::vector<PlaneTarget> planes;  // in channel order, or none with coefficients
    const ComponentTarget* coefficients;  // instead of planes, or null
};

inline constexpr unsigned kClasses = 64, kFamilies = 3, kTableRows = 88;

struct FusedDecode {
    KVType type;      // of the targets
    KVType stored;    // of the object
    unsigned passes;  // of the whole object
    const Tables& coarse;  // kFamilies * kTableRows models
    const Tables& refine;  // twice as many: one for each context
    size_t threads;        // at most so many
    std::vector<RopeKind> ropes;
    std::vector<FusedGroup> groups;
};

// Throws Error: Truncated or Corrupt for bytes, Geometry for sizes that contradict one another.
// After an error the targets hold anything. Memory: see docs/fused-decode.md.
void decode_groups(const FusedDecode& work);

// The second half of decoding with a profile: floats of one plane, rows in the order of
// coefficients, to where they go. cos, sin: tokens * half each, in token order, or null.
struct FinishPlane {
    KVType type;
    uint64_t tokens;
    const float* values;
    size_t row_stride;  // floats
    const float* mean;  // of the plane's channels
    float factor;
    const float *cos, *sin;
    size_t half;
    bool interleaved;
    PlaneTarget plane;
    std::span<const uint8_t> exempt;  // by token: nothing is stored where it is not 0
};
void finish_plane(const FinishPlane& work);

}  // namespace cachegen
