// Decoding of planes that were quantised by max-abs scales: the `int8` and `cachegen` codecs. From
// the bytes of their passes to K and V in the caller's memory, block by block, without a matrix of
// symbols.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "alias_table.h"
#include "float_bits.h"
#include "fused_decode.h"

namespace cachegen {

enum class MatrixKind : uint8_t { Rans, Bytes, Packed };

// One pass: a matrix of symbols, 0 to 2 * levels, and a scale for each row, or each head of a row.
// Views; the caller keeps them alive.
struct MatrixSource {
    uint64_t rows;
    MatrixKind kind;
    unsigned bits;                      // of Packed
    std::span<const uint8_t> body;
    // Models of rANS: a row of `alphabet` 16-bit frequencies for each channel,
    std::span<const uint8_t> freqs;
    size_t alphabet;
    // or without those one of `shared` for each channel, and what was subtracted from the digit
    // above the low ones, modulo 32.
    std::span<const uint8_t> classes, rotations;
    unsigned shift;                     // raw low bits within rANS
    unsigned low_bits;                  // low digits that come apart, behind all of these
    std::span<const uint8_t> low;       // packed; empty if they are missing
    unsigned levels;
    std::span<const uint8_t> scales;    // rows * (heads or 1) elements of the stored type
    bool per_head;
};

// Where its plane goes is `target`, of which RoPE is ignored. Without group_tokens there is one
// matrix. With them rows of the first are every group_tokens-th token, the anchors, and those of the
// second, if it is there, the other tokens less the anchor before them.
struct QuantizedPlane {
    uint64_t tokens;
    unsigned group_tokens;
    std::vector<MatrixSource> passes;
    PlaneTarget target;
};

struct PlaneDecode {
    KVType type;           // of the targets
    KVType stored;         // of the object
    const Tables& shared;  // the frozen table set
    size_t threads;        // at most so many
    std::vector<QuantizedPlane> planes;
};

// Throws Error: Truncated or Corrupt for bytes, Geometry for sizes that contradict one another.
// After an error the targets hold anything. Memory of each thread: 704 bytes for each channel that
// has a model of its own, 20 KiB, and the anchors of one plane.
void decode_planes(const PlaneDecode& work);

}  // namespace cachegen
