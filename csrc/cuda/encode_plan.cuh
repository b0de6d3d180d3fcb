// What the host tells the encoder's kernels, beside plan.cuh: the same rules hold. A launch has
// Sources as its groups, Symbols as its matrices, Runs as its streams, and ChunkStates where a
// decoder has numbers of active columns.
#pragma once

#include "sink.cuh"

namespace cachegen {

inline constexpr unsigned kTile = 32;       // channels of a warp that goes through all tokens
inline constexpr unsigned kPartials = 32;   // 64-bit numbers that it leaves behind
inline constexpr unsigned kCoarseCounters = 18, kRefineCounters = 6;
inline constexpr unsigned kCounters = kCoarseCounters + kRefineCounters * (kMaxPasses - 1);
inline constexpr unsigned kAllClasses = 192;
inline constexpr unsigned kDecays = 4;
inline constexpr unsigned kOffsets = 25;    // shifts of a profile's classes: -12 to 12
inline constexpr uint32_t kErrorPlaces = 8;  // every so many places errors are measured
inline constexpr uint32_t kFewTokens = 8;    // fewer have no mean and no outliers
inline constexpr uint32_t kExempt = 1, kOdd = 2;  // marks of a token
inline constexpr float kLargestMagnitude = 1.2676506002282294e30f;  // 2^100
inline constexpr uint32_t kHugeBits = (127u + 50) << 23;  // 2^50: squares beyond do not sum in a float

// What made a kernel give up, beside those of plan.cuh. The host then encodes on the CPU, which
// does it or names the error.
inline constexpr uint32_t kBadValue = 16, kBeyondReach = 32, kOutOfRoom = 64;

// A group of progressive on its way from values to digits.
struct Source {
    uint64_t values;      // floats: rows as the planes join them, weighted; or components
    uint64_t centres;     // floats, one a channel: what sums and norms are taken from
    uint64_t sums;        // floats, one a channel
    uint64_t norms;       // floats, one a token; with a profile doubles
    uint64_t largest;     // bits of floats, one a token
    uint64_t marks;       // bytes, one a token
    uint64_t means;       // floats, one a channel
    uint64_t levels;      // int8, one a channel: means as they are stored
    uint64_t classes;     // bytes, one a channel
    uint64_t histogram;   // uint32: 64 classes of bins, see climb.cuh
    uint64_t result;      // GroupResult
    uint64_t partials;    // kPartials numbers of 64 bits for each tile
    uint64_t deviations;  // floats of a profile's components; 0: no profile
    uint64_t families;    // bytes of the same
    uint64_t halves;      // workspace of the transform: two matrices of halves
    uint64_t forward;     // halves, a row of `stride` for each component
    uint64_t forward_low; // what rounding to halves lost, 0: nothing
    uint64_t centre;      // floats: what is subtracted before the transform
    uint64_t pairs;       // of a sparse pass 0, see sparse.cuh, in any order
    uint32_t tokens, channels, stride, passes;
    uint32_t plane, planes;  // first one, number of them
    uint32_t chunk, sinks, error, tiles;
    uint32_t components;
    float forward_scale;
};
static_assert(sizeof(Source) == 200);

// What the host learns of a group.
struct GroupResult {
    double errors[kDecays][kMaxPasses];  // squared, in finest steps, after each pass
    double energy;
    uint32_t largest;  // bits of a float: of the coefficients, in steps
    uint32_t widest;   // bits of a float: of the rows before a transform
    float mean_scale;
    uint32_t exempt;
    int32_t offset;
    uint32_t done;     // no more outliers
    uint32_t nonzero;  // symbols of pass 0 that are not 0
    uint32_t listed;   // how many of them are among the pairs
};
static_assert(sizeof(GroupResult) == 232);

// One chunk of progressive.
struct ChunkState {
    double relative, values;  // of the step; the number of values
    double spread;            // out
    float step;               // out
    uint32_t first_group, groups, zero;
};
static_assert(sizeof(ChunkState) == 40);

// A tile of a matrix.
struct Columns {
    uint32_t owner, first;
};
static_assert(sizeof(Columns) == 8);

// A stream to be written: its parts lie where there is room for them, words and escapes from the
// end of theirs.
struct Run {
    uint64_t states;   // out
    uint64_t raw;      // out: words of 32 bits
    uint64_t words;    // room for `word_room`
    uint64_t escapes;  // room for `escape_room` bytes
    uint64_t counts;   // out: words, escapes
    uint32_t word_room, escape_room;
    uint32_t begin_step, end_step;
    uint32_t lanes, owner, pass, zero;
};
static_assert(sizeof(Run) == 72);

// A symbol matrix of int8 or cachegen.
struct Symbols {
    uint64_t symbols;    // bytes, rows of channels
    uint64_t scales;     // out, in the plane's dtype
    uint64_t anchors;    // decoded anchors: out of anchors, in for deltas
    uint64_t missing;    // doubles, one a row: squared differences that anchors leave; of deltas
    uint64_t classes, rotations;  // out, bytes; 0: none
    uint64_t freqs;      // out, uint16: of models made for the chunk; 0: none
    uint64_t inverses;   // of the models
    uint32_t tokens, channels, places;
    uint32_t levels, scale_width;
    uint32_t shift;      // of digits that go raw or into a segment of their own
    uint32_t raw;        // low digits that go into the streams
    uint32_t alphabet, buckets;
    uint32_t anchor_tokens, is_delta;
    uint32_t plane, error;
    uint32_t zero;
};
static_assert(sizeof(Symbols) == 120);

// Bytes to be put beside each other for the way to the host.
struct Span {
    uint64_t from, to;
    uint32_t size, zero;
};
static_assert(sizeof(Span) == 24);

// A segment that is stored without entropy coding, or rows that are stored as they are.
struct Plain {
    uint64_t to;
    uint32_t owner;   // Source, or Symbols for `low` and `high`
    uint32_t what;    // see gather.cuh
    uint32_t pass;    // or the first bit
    uint32_t bits;
    uint64_t tokens;  // uint32 each: rows to take
    uint32_t count, zero;
};
static_assert(sizeof(Plain) == 40);

// ---- Sums of a warp, always in the same order ---------------------------------------------------

CACHEGEN_DEVICE double shuffle_double(double value, unsigned lane) {
    const uint64_t bits = bits_of_double(value);
    const uint64_t low = shuffle(static_cast<uint32_t>(bits), lane);
    const uint64_t high = shuffle(static_cast<uint32_t>(bits >> 32), lane);
    return double_of_bits(high << 32 | low);
}

CACHEGEN_DEVICE double warp_sum(double value) {
    for (unsigned half = 16; half; half /= 2)
        value = sum(value, shuffle_double(value, lane_index() ^ half));
    return value;
}

CACHEGEN_DEVICE uint32_t warp_sum(uint32_t value) {
    for (unsigned half = 16; half; half /= 2) value += shuffle(value, lane_index() ^ half);
    return value;
}

CACHEGEN_DEVICE uint32_t warp_max(uint32_t value) {
    for (unsigned half = 16; half; half /= 2) {
        const uint32_t other = shuffle(value, lane_index() ^ half);
        value = other > value ? other : value;
    }
    return value;
}

CACHEGEN_DEVICE float magnitude_of(float value) { return as_float(as_bits(value) & 0x7fffffffu); }

// Whether a value is infinite, NaN or beyond 2^100, told by its bits.
CACHEGEN_DEVICE bool is_too_large(uint32_t bits, uint32_t dtype) {
    if (dtype == kFloat32) return (bits & 0x7fffffffu) > (127u + 100) << 23;
    return (bits & 0x7fffu) > (dtype == kBFloat16 ? (127u + 100) << 7 : 0x7bffu);
}

// The warp of the launch, for kernels whose warps work alone.
CACHEGEN_DEVICE unsigned warp_of_launch() { return block_index() * 4 + thread_index() / kLanes; }

}  // namespace cachegen
