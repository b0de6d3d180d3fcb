// Encoding of planes with max-abs scales: the `int8` and `cachegen` codecs. From K and V to the bytes
// of their segments, a plane at a time; docs/fused-encode.md, "Planes with scales".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "alias_table.h"
#include "body_store.h"
#include "plane_decode.h"
#include "quantize.h"

namespace cachegen {

// A plane, the largest symbol of which is 2 * levels, and room for its scales (see quantize).
struct PlaneToEncode {
    Plane<const std::byte> values;
    unsigned levels;
    std::byte* scales;
};

struct PlaneEncode {
    std::vector<PlaneToEncode> planes;
    bool per_head;
    // So many low bits of the symbols are packed in a matrix of their own, which leaves 32 values. 0:
    // they go raw into the body, as few as leave 32 values.
    unsigned low_bits;
    // The frozen table set and costs in it (see fit_classes); or null: every channel has a table of
    // its own, made from what it counts, with bits_saved (see normalize_counts).
    const Tables* shared;
    std::span<const int16_t> costs;
    std::span<const double> bits_saved;
    size_t threads;
};

// What to store of a plane beside its scales. Packed holds all but the low bits.
struct EncodedPlane {
    MatrixKind kind = MatrixKind::Bytes;
    std::vector<uint8_t> tables;
    std::span<const uint8_t> body, low;
};
struct EncodedPlanes {
    std::vector<EncodedPlane> planes;
    std::vector<BodyStore> stores;  // where bodies are
};

// Throws what quantize throws for the first plane that it refuses. Memory of each thread: 2 bytes for
// each value of a plane, 5/4 KiB for each channel of it, and 350 KiB.
EncodedPlanes encode_planes(const PlaneEncode& work);

}  // namespace cachegen
