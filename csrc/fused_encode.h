// Encoding of the `progressive` codec in two passes over the input: a survey of every group, then
// digits, statistics and all passes of the entropy coder. docs/fused-encode.md derives it, and
// codec/encode_reference.py does the same in NumPy, to the byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "aligned.h"
#include "body_store.h"
#include "encode_kernels.h"
#include "encode_tables.h"
#include "float_bits.h"
#include "ladder.h"

namespace cachegen {

inline constexpr unsigned kDecays = 4;
// Every so many places the errors of one are measured.
inline constexpr size_t kErrorPlaces = 8;
inline constexpr uint64_t kPassStreamSteps = 4096;

// One plane of a chunk: token t, head h at data + t * token_stride + h * head_stride, `dim` elements
// side by side. cos and sin, to turn keys back: `half` rows of a number for each token, ordered as
// element e of place p is at 32 p + e (see encode_kernels.h), each row as long as all places; or null.
struct EncodePlane {
    const std::byte* data;
    KVType type;
    int64_t token_stride, head_stride;  // bytes
    uint32_t heads, dim;
    float weight;
    const float *cos, *sin;
    size_t half;
    bool interleaved;
};

// One coded pass of a group.
struct EncodedPass {
    enum class Kind : uint8_t { Rans, Bytes, Packed, Sparse } kind;
    std::span<const uint8_t> body;
};

struct EncodeGroup {
    Shape shape;
    std::vector<EncodePlane> planes;
    // With a profile: components, rows of places * kLanes in the order of cos and sin; and their
    // families and classes before they are shifted.
    const float* components = nullptr;
    std::span<const uint8_t> families, base_classes;
    // Tokens that are exempt from the beginning, rising; later all exempt ones.
    std::vector<uint32_t> exempt;

    // What survey_groups finds. Mean: levels * scale, or none where the scale is 0.
    bool refused = false;  // NaN, Inf or a magnitude beyond 2^100
    double energy = 0;     // of the centred values that are not exempt
    std::vector<int8_t> mean_levels;
    float mean_scale = 0;

    // What encode_groups finds.
    std::vector<uint8_t> classes;  // family * 64 + class
    int class_offset = 0;
    // Squared error after each pass with each decay, in squared finest steps.
    std::array<std::array<double, kMaxPasses>, kDecays> errors{};
    std::vector<EncodedPass> passes;
};

// What is the same for all groups of all objects with so many passes.
struct EncodeSettings {
    unsigned passes;
    const EncodeTables& tables;
    const int16_t* costs;           // see LadderEncodeRows::code_lengths
    const double* centroids;        // [decay][pass][late][class]: of a cell, in its widths
};

void survey_groups(std::span<EncodeGroup> groups, size_t threads);

// step: the finest one. Returns where the bodies are.
[[nodiscard]] std::vector<BodyStore> encode_groups(std::span<EncodeGroup> groups,
                                                   const EncodeSettings& settings, float step,
                                                   size_t threads);

// ---- Parts, of one group and one thread --------------------------------------------------------

// Tokens by place and element, and which of them count.
class TokenRows {
public:
    explicit TokenRows(const Shape& shape) : shape_(shape), places_(shape.places()) {}

    size_t places() const { return places_; }
    // Beyond the tokens for an idle lane.
    uint64_t token(size_t place, unsigned element) const {
        return (kLanes - 1 - element) * places_ + place;
    }
    // A row for each place: all ones, or 0 where a token is idle or exempt.
    std::vector<uint32_t> keep(std::span<const uint32_t> exempt) const;

private:
    Shape shape_;
    size_t places_;
};

// Reads one head at one place as rows of floats, keys turned back, not yet weighted.
class UnitReader {
public:
    explicit UnitReader(const EncodeGroup& group);
    void read(const EncodePlane& plane, size_t head, size_t place, float* rows) const;
    // Asks for the group before it is read.
    void prefetch() const;
    size_t widest() const { return widest_; }

private:
    TokenRows tokens_;
    uint64_t held_;
    std::span<const EncodePlane> planes_;
    size_t widest_ = 0;
    std::vector<std::byte> nothing_;  // what idle lanes read
};

void survey_group(EncodeGroup& group);

// Digits of a whole group: rows of kLanes elements, channel by channel, place by place.
struct GroupDigits {
    AlignedVector<uint16_t> codes;
    AlignedVector<uint8_t> symbols;
    AlignedVector<uint8_t> tallies;  // of the channels, see QuantizeJob; or none
    AlignedVector<uint16_t> bins;  // of every kErrorPlaces-th place
    // Of each channel the largest magnitude of pass 0, 16 for all from there on: by fit_group.
    std::vector<uint8_t> most;
};

// Chooses the classes of a group and measures errors.
void fit_group(EncodeGroup& group, GroupDigits& digits, const EncodeSettings& settings);

// Codes all passes; its buffers serve one group after the other. Symbols beyond an escape index are
// replaced by it.
class PassWriter {
public:
    explicit PassWriter(BodyStore& store) : store_(store) {}
    void write(EncodeGroup& group, GroupDigits& digits, const EncodeSettings& settings);

private:
    class Work;
    BodyStore& store_;
    // Of the streams at work.
    std::array<std::array<AlignedVector<uint16_t>, kMaxPasses>, kStreamsAtOnce> words_;
    std::array<std::vector<uint8_t>, kMaxPasses> bodies_;
};

}  // namespace cachegen
