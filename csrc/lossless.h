// Planes of the `lossless` codec (FORMAT.md): signs and exponents entropy-coded, mantissas packed.
// codec/reference_lossless.py says the same in NumPy, with equal bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "float_bits.h"
#include "fused_decode.h"
#include "quantize.h"

namespace cachegen {

inline constexpr unsigned kListedDistance = 127;  // the exponent stands in the list
inline constexpr unsigned kLosslessEscape = kMaxAlphabet - 1;
inline constexpr unsigned kMostLosslessTables = 16;

struct FloatFields {
    unsigned exponent, mantissa;  // bits
    size_t bytes;                 // of an element

    unsigned infinite() const { return (1u << exponent) - 1; }
};

inline constexpr FloatFields fields_of(KVType type) {
    switch (type) {
        case KVType::Float16: return {5, 10, 2};
        case KVType::BFloat16: return {8, 7, 2};
        case KVType::Float32: break;
    }
    return {8, 23, 4};
}

// What frequencies 0 to 4096 are worth, as the caller computes it.
struct LosslessCosts {
    std::span<const int16_t> costs;      // 12 - log2 f in 1/1024 bit, whole numbers; 0 for 0
    std::span<const double> bits_saved;  // see normalize_counts
};

// Both are empty where a plane would not become smaller.
struct LosslessPlane {
    std::vector<uint8_t> side, body;
};

// threads: at most so many, each with three to five bytes for every value of a plane.
std::vector<LosslessPlane> encode_lossless(std::span<const Plane<const std::byte>> planes,
                                           const LosslessCosts& costs, size_t threads);

// A plane of `tokens` tokens; RoPE of the target is not looked at. Without side information `body`
// holds the values as they are.
struct LosslessSource {
    uint64_t tokens;
    std::span<const uint8_t> side, body;
    PlaneTarget target;
};

struct LosslessDecode {
    KVType type;     // of the targets
    KVType stored;   // of the object
    size_t threads;  // at most so many
    std::vector<LosslessSource> planes;
};

// Throws Error: Truncated or Corrupt; after an error the targets hold anything. Memory of each
// thread: a byte for every value of a plane.
void decode_lossless(const LosslessDecode& work);

}  // namespace cachegen
