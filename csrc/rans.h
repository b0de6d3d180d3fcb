// rANS segments: a whole symbol matrix to bytes and back (FORMAT.md is the law).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "alias_table.h"
#include "error.h"
#include "format.h"

namespace cachegen {

// Everything that the decoder must know beside the body. Views; the caller keeps them alive.
struct Coding {
    Shape shape;
    const Tables& tables;
    std::span<const uint16_t> models;  // C entries, or P*C if models_per_place
    bool models_per_place;
    std::span<const uint8_t> shifts;  // C entries, or empty if all are 0
    const uint8_t* contexts = nullptr;  // T x C bytes, 0 or 1, or null
    // For the encoder alone. C rotations, subtracted modulo 32 from what is left of the symbols
    // without their low bits, or empty if symbols are as they are coded; then `dropped` low bits do
    // not go into the body at all. Tables of its own, with K = buckets(), or null for those of `tables`.
    std::span<const uint8_t> rotations = {};
    unsigned dropped = 0;
    const InverseTable* inverse = nullptr;

    // K of the alias tables.
    unsigned buckets() const { return contexts ? kContextBuckets : tables.buckets(); }

    // Model indices of a step and of those behind it at the same place; contexts come on top.
    const uint16_t* models_at(uint64_t step) const {
        return models.data() + (models_per_place ? step : step % shape.channels);
    }
};

// symbols: T x C bytes, row by row. Throws Error: Config for a symbol that its model cannot code,
// and for whatever check_coding refuses.
std::vector<uint8_t> encode_segment(const uint8_t* symbols, const Coding& coding,
                                    uint64_t stream_steps);

// Encodes one segment after the other in the same memory.
class SegmentEncoder {
public:
    SegmentEncoder();
    ~SegmentEncoder();
    // As above, of a sound coding. The body is there until the next call.
    std::span<const uint8_t> encode(const uint8_t* symbols, const Coding& coding,
                                    uint64_t stream_steps);

private:
    struct Memory;
    class Work;
    std::unique_ptr<Memory> memory_;
};

// Decodes the streams [first, first + count) into `symbols`, T x C bytes, and leaves all other
// bytes alone; count is cut to what exists. With null nothing is kept, but all is checked. Throws Error: Truncated or Corrupt, after which
// `symbols` holds anything.
void decode_segment(std::span<const uint8_t> body, const Coding& coding, uint64_t first,
                    uint64_t count, uint8_t* symbols);

// Throws Error of this kind if a model index or a digit shift is out of range, or if contexts come
// with what they exclude. The contexts themselves are checked where they are read.
void check_coding(const Coding& coding, ErrorKind kind);

}  // namespace cachegen
