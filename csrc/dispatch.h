// The one place where an instruction set is chosen. Every backend is one file that defines one
// `Kernels`; nothing else in the core may depend on the processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "alias_table.h"
#include "encode_kernels.h"
#include "float_bits.h"
#include "ladder.h"

namespace cachegen {

// A block is a run of steps at one place, one row of kLanes bytes per step, in room for
// kBlockSteps, aligned to 64 bytes. In the symbol matrix it is one row of steps per lane. Kernels
// code a block per call, so that it stays in the first-level cache.
inline constexpr size_t kBlockSteps = 128;
// Streams that a kernel codes side by side, so that their dependency chains overlap.
inline constexpr size_t kGroupStreams = 4;

// So many bytes behind the words of a stream can be read: kernels look for the end of the words
// every few steps only.
inline constexpr size_t kWordSlack = 1024;

// Part of one stream to decode: consecutive steps of one place. The kernel advances state and
// words; it uses nothing at or beyond words_end, and reads less than kWordSlack bytes there.
struct DecodeRun {
    uint32_t state[kLanes];
    const uint8_t* words;  // 2 bytes each, little-endian, of any alignment
    const uint8_t* words_end;
    const uint16_t* models;   // one model index per step
    const uint8_t* contexts;  // a block, each 0 or 1, or null; with them K = 4
    uint8_t* symbols;         // a block; idle lanes hold anything afterwards
    int16_t* values;          // a block of values instead, for decode_coarse and decode_refine
    uint32_t* escaped;        // written by decode_coarse if any_escaped, one per step: lanes with
                              // the escape index, whose values are void
    bool any_escaped;         // set by decode_coarse; idle lanes count too
    int late_below;           // for decode_refine itself
    unsigned lanes;           // active ones, 1 to 32
    bool starved;             // set by the kernel when a word was missing
};

// Part of one stream to encode, backwards. words points behind free space for one word per symbol;
// the kernel writes downwards and moves it. All symbols are below 32, those of idle lanes are 0.
struct EncodeRun {
    uint32_t state[kLanes];
    uint16_t* words;
    const uint16_t* models;
    const uint8_t* contexts;  // as above
    const uint8_t* symbols;   // a block
    unsigned lanes;
    bool uncodable;  // set by the kernel when a symbol had the frequency 0; all else is void then
};

// Some places of a packed matrix: `bits` planes of `plane_bytes` each, from bit `at` of each on.
struct PackedRow {
    const uint8_t* planes;
    uint64_t plane_bytes, at;
    unsigned bits;
};

inline constexpr size_t kCountedChannels = 64, kCountedTokens = 256;
inline constexpr size_t kRotations = 3;  // that are tried for a channel

// Rows of at most kBlockSteps symbols, but for `largest`; see symbol_rows.h.
struct SymbolRows {
    void (*join_planes)(const PackedRow& from, size_t size, uint8_t* out);
    unsigned (*largest)(const uint8_t* symbols, size_t size);
    // This one and add_low_digits change symbols in place and return the largest.
    unsigned (*rotate_block)(const uint8_t* offsets, size_t steps, unsigned lanes, uint8_t* block);
    // Rows of a block: without their low bits, plus an offset for each row, modulo 32.
    void (*turn_block)(const uint8_t* offsets, unsigned bits, size_t steps, uint8_t* block);
    unsigned (*add_low_digits)(const PackedRow& low, unsigned bits, unsigned centre, size_t size,
                               uint8_t* symbols);
    // Adds to counts, a row of `alphabet` for each channel: of up to kCountedTokens rows `stride`
    // apart and up to kCountedChannels channels, how often each value symbol >> shift is there.
    void (*count)(const uint8_t* symbols, size_t stride, size_t tokens, size_t channels,
                  unsigned shift, size_t alphabet, uint32_t* counts);
    // bits[r * classes + c]: sum over 32 values of counts[r] times costs[value / 2][c][value % 2], below
    // 2^32, for kRotations rows of counts. Returns the first of the least.
    size_t (*best_class)(const uint16_t* const* counts, const int16_t* costs, size_t classes,
                         uint32_t* bits);
    // Copies what is not read again soon. A fence has to follow before others look.
    void (*stream)(const std::byte* from, size_t bytes, std::byte* to);
    // Bits [first, first + count) of any number of bytes as bit-planes that are `plane_bytes` apart,
    // the last byte of each filled with 0.
    void (*split_planes)(const uint8_t* bytes, size_t size, unsigned first, unsigned count,
                         size_t plane_bytes, uint8_t* planes);
};

// Some channels of a token for `lossless`. top, flip, symbols: one byte for each channel.
struct LosslessRow {
    size_t size;
    const uint8_t *top, *flip;
    uint8_t* symbols;
    uint8_t* mantissas[3];     // byte by byte, without the `left_out` low bits, which are 0
    unsigned left_out, bytes;  // bytes: how many of mantissas there are
};
inline constexpr unsigned kWrongDistance = 1, kAnyListed = 2;

struct LosslessRows {
    // Of values side by side: the largest exponent that is finite, and how many are negative, added
    // to what is there, in elements as wide as the values. Returns all bits that are anywhere 1.
    uint32_t (*survey)(const void* values, size_t size, void* top, void* negative);
    // Fills symbols and mantissas. Returns the largest symbol.
    unsigned (*part)(const LosslessRow& row, const void* values);
    // Undoes it, listed exponents being 0. Returns whether any distance is beyond the top, and
    // whether any is listed.
    unsigned (*join)(const LosslessRow& row, void* values);
};

struct Kernels {
    std::string_view isa;
    bool (*is_available)();

    // Decode `steps` steps, at most kBlockSteps, of each of 1 to kGroupStreams runs. K is
    // `buckets`: 16 or 32, or 4 if the runs have contexts.
    void (*decode_runs)(const AliasTable* tables, unsigned buckets, DecodeRun* const* runs,
                        size_t count, size_t steps);
    // The same many of each of 1 to kGroupStreams runs.
    void (*encode_runs)(const InverseTable* tables, unsigned buckets, EncodeRun* const* runs,
                        size_t count, size_t steps);

    // Tables with K = 16 or 32 for rows of `alphabet` frequencies, see alias_table.h; null where the
    // portable ones are as good. reciprocals: by frequency.
    void (*build_alias)(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                        AliasTable* tables);
    void (*build_inverse)(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                          const float* reciprocals, InverseTable* tables);

    // Copy the active lanes of a block to matrix rows that are `stride` bytes apart, or from there;
    // gather fills idle lanes with 0. What is behind `steps` in a block may change.
    void (*scatter)(const uint8_t* block, size_t steps, uint8_t* first_row, size_t stride,
                    unsigned lanes);
    void (*gather)(const uint8_t* first_row, size_t stride, unsigned lanes, size_t steps,
                   uint8_t* block);

    // The same for `progressive`, from words to values at once; null where a backend does it in two
    // steps. decode_refine changes values in place; late_below: 3^k before the pass, and its models
    // are those of context 0.
    void (*decode_coarse)(const CoarseTable* tables, DecodeRun* const* runs, size_t count,
                          size_t steps);
    void (*decode_refine)(const RefineTable* tables, int late_below, DecodeRun* const* runs,
                          size_t count, size_t steps);

    // Bit l of found[s]: whether byte l of row s of a block is wanted[s].
    void (*find_bytes)(const uint8_t* block, const uint8_t* wanted, size_t steps, uint32_t* found);

    // Values of `progressive`, rows of kLanes like the symbols they come from; see ladder.h.
    void (*coarse_values)(const uint8_t* symbols, size_t steps, int16_t* values);
    void (*value_contexts)(const int16_t* values, size_t steps, uint8_t* contexts);
    void (*refine_values)(const uint8_t* digits, int late_below, size_t steps, int16_t* values);
    void (*finish_unit[kKVTypes])(const UnitJob& job);
    // Fills a row of UnitJob::lookup for each row of a job, of which values are not read.
    void (*fill_lookup[kKVTypes])(const UnitJob& job, void* lookup);
    void (*turn_means[kKVTypes])(const MeansJob& job);
    void (*scale_rows)(const UnitJob& job, float* out, size_t stride, uint8_t* used);
    void (*finish_row[kKVTypes])(const RowsJob& job);
    LadderEncodeRows encode_rows;
    const uint8_t* angle_lanes;  // kLanes: which lane each entry of a row of cos and sin is for

    // One head of one token, `size` values side by side; indexed by KVType.
    struct PerType {
        // Largest magnitude as bits without the sign: NaN > Inf > every number.
        uint32_t (*max_magnitude)(const void* values, size_t size);
        // symbol = rint(value * levels / maximum) + levels, maximum > 0 and finite.
        void (*quantize)(const void* values, size_t size, float levels, float maximum,
                         uint8_t* symbols);
        // value = (symbol - levels) * step
        void (*dequantize)(const uint8_t* symbols, size_t size, float levels, float step,
                           void* values);
    } per_type[kKVTypes];
    SymbolRows symbol_rows;
    LosslessRows lossless_rows[kKVTypes];
};

// All backends of this build, slowest first. Some may need a newer processor than this one.
const std::vector<const Kernels*>& backends();

// The backend in use: the one named by CACHEGEN_ISA, else the fastest available; settled on the
// first call. Throws Error (Config) if CACHEGEN_ISA names none that this machine can run.
const Kernels& kernels();

// Use this backend from now on. Throws Error (Config) as above.
void select_isa(std::string_view isa);

extern const Kernels kScalarKernels;
#if CACHEGEN_X86_KERNELS
extern const Kernels kAvx2Kernels, kAvx512Kernels;

// Whether processor and operating system have what these kernels are compiled for. They stand
// apart from the kernels, whose files no older processor may enter.
bool has_avx2();
bool has_avx512();
#endif

#if CACHEGEN_NEON_KERNELS
extern const Kernels kNeonKernels;
#endif

// The portable encoder, for backends without one of their own.
void encode_runs_scalar(const InverseTable* tables, unsigned buckets, EncodeRun* const* runs,
                        size_t count, size_t steps);

}  // namespace cachegen
