// What the host tells the kernels. Every struct is an array element in device memory, laid out as
// the NumPy types in src/cachegen/native/cuda/plan.py; addresses are 64-bit numbers. The host has
// checked every length and index in here against the buffers before a kernel sees it.
#pragma once

#include "warp.cuh"

#include "../format.h"

namespace cachegen {

inline constexpr unsigned kBlockSteps = 8;   // steps that a warp decodes between two checks
inline constexpr unsigned kMaxPasses = 6;
inline constexpr unsigned kClasses = 64;
inline constexpr unsigned kRows = 88;
inline constexpr int kLowestRow = -24;

inline constexpr uint32_t kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2;
inline constexpr uint32_t kRans = 1, kPacked = 2, kBytes = 3, kSparse = 4;  // kinds of segments

// What a kernel found wrong with a segment. The host decodes it again to name the error.
inline constexpr uint32_t kBadStream = 1, kBadSymbol = 2, kBadScale = 4, kBadSlot = 8;

template <class T>
CACHEGEN_DEVICE T* at_address(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

CACHEGEN_DEVICE uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }

// One stream of a segment: where its parts lie, which steps it holds.
struct Stream {
    uint64_t base;      // address of the lane states; the other offsets are from here. Of a sparse
                        // pass the address of the first pair, see sparse.cuh
    uint32_t raw;       // bytes
    uint32_t words;     // bytes
    uint32_t word_count;
    uint32_t escapes;   // bytes
    uint32_t escape_count;
    uint32_t begin_step, end_step;
    uint32_t lanes;
    uint32_t owner;     // index of the matrix or group
    uint32_t first;     // index of this stream among those of its owner
};
static_assert(sizeof(Stream) == 48);

// Where one plane of a chunk goes and what is done to it last.
struct Plane {
    uint64_t base;        // address of slot 0, head 0, dimension 0
    uint64_t rows;        // address of an int64 for each token held: element offset, < 0 for none
    int64_t head_stride;  // elements
    uint64_t rope;        // address of (cosine, sine) pairs, see kernel rope_table; 0: none
    uint32_t heads, dim;
    uint32_t half;        // pairs of channels that RoPE turns
    uint32_t interleaved;
    uint32_t dtype;
    uint32_t first_channel;  // in its group
    float divisor;           // weight of V
    uint32_t tokens;         // held
};
static_assert(sizeof(Plane) == 64);

// A symbol matrix of int8 or cachegen.
struct Matrix {
    uint64_t tables;     // packed buckets of its models
    uint64_t classes;    // model of every channel, bytes; 0: one model for each channel
    uint64_t rotations;  // bytes; 0: none
    uint64_t body;       // of a segment that is not rANS
    uint64_t low;        // packed low digits of int8; 0: none
    uint64_t scales;     // in the plane's dtype, of any alignment
    uint64_t anchors;    // decoded anchors (rows of channels); written by anchors, added by deltas
    uint32_t buckets, shift, kind, bits;
    uint32_t tokens, channels, places;
    uint32_t levels;
    uint32_t low_bits, low_centre;
    uint32_t scale_width;  // channels that share a scale
    uint32_t anchor_tokens, is_delta;
    uint32_t plane;
    uint32_t spreads;  // anchors without deltas: every row of a group gets the anchor
    uint32_t error;
};
static_assert(sizeof(Matrix) == 120);

// The pass of a group of progressive.
struct Pass {
    uint64_t body;  // of a segment that is not rANS
    uint32_t kind;
    uint32_t first_stream;
};

struct Group {
    uint64_t classes;    // family * 64 + class of every channel, bytes
    uint64_t constants;  // 64 pairs of float: what is added to the magnitude, see progressive.cuh
    uint64_t means;      // floats, one per channel; 0: none
    uint64_t coefficients;  // workspace, 0: finish at once
    uint64_t basis;         // halves, a row of `stride` for each channel; 0: none
    uint64_t basis_low;     // what rounding to halves lost, 0: nothing
    uint64_t exempt_tokens;  // uint32 each
    uint64_t exempt_rows;    // in the planes' dtype, of any alignment
    Pass passes[kMaxPasses];
    uint32_t tokens, channels, places;
    uint32_t total_passes;
    uint32_t plane, planes;  // first one, number of them
    uint32_t exempt;
    float step;
    uint32_t stride;  // elements of a row of the workspace
    uint32_t active;  // address (index) of the number of columns that are not zero
    uint32_t error;
    float basis_scale;  // of the basis in memory
};
static_assert(sizeof(Group) == 208);

// A set of tokens that go to slots.
struct Slots {
    uint64_t mapping;  // int64 per token; 0: token t goes to slot t
    uint64_t rows;     // out: int64 per token
    int64_t block_stride, slot_stride;  // elements
    uint64_t slots;    // there are so many
    uint32_t block_slots, tokens, error, zero;
};
static_assert(sizeof(Slots) == 56);

// Angles of a run of tokens.
struct Rope {
    uint64_t frequencies;  // floats
    uint64_t table;        // out: (cosine, sine) of token lane * places + place at
                           // [(place * half + pair) * 32 + lane]
    double position;       // of the first token
    float scale;
    uint32_t half, tokens, places;
};
static_assert(sizeof(Rope) == 40);

// Frequencies to alias tables.
struct Models {
    uint64_t freqs;    // uint16, of any alignment, `alphabet` per model
    uint64_t buckets;  // out
    uint32_t count, alphabet, kind, error;
};
static_assert(sizeof(Models) == 32);

// What a launch gets: addresses of the arrays above.
struct Launch {
    uint64_t streams, matrices, groups, planes;
    uint64_t coarse, coarse_escapes, refine;  // frozen tables of progressive
    uint64_t errors;                          // uint32, bits of what is wrong
    uint64_t active;                          // uint32 per group
    uint64_t items;                           // what this launch works on: Slots, Rope, Models, ...
    uint32_t first, count;                    // of the items or streams of this launch
    uint32_t extra, zero;
};
static_assert(sizeof(Launch) == 96);

}  // namespace cachegen
