// What an instruction set brings for the encoder of `progressive` (docs/fused-encode.md).
//
// Everything works on rows of kLanes elements: one channel at one place. Element e is lane
// kLanes - 1 - e, so that the words of a step, which the encoder meets from the last lane to the
// first, are in the order of the elements; see PassRun.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_bits.h"
#include "format.h"
#include "ladder.h"

namespace cachegen {

// Streams of a pass that go side by side.
inline constexpr size_t kStreamsAtOnce = 2;
inline constexpr unsigned kMaxRefinements = kMaxPasses - 1;
inline constexpr unsigned kWays = 192;        // families times classes
inline constexpr unsigned kCoarseCounts = 18;  // magnitudes 0 to 15, 16 and more, and nothing
inline constexpr unsigned kRefineCounts = 6;   // (context, digit)
inline constexpr unsigned kMaxCounts = kCoarseCounts + kMaxRefinements * kRefineCounts;

// Largest magnitude, in cells of 1.2 steps, of a value that is not significant in pass 0.
inline constexpr int most_late(unsigned refinements) { return (power_of_three(refinements) - 1) / 2; }

// A quarter of the finest cell is a bin of the error histograms: those of late values and zeros
// first (4 * (magnitude in cells + 1/2)), then those of early ones by their place in the cell of
// pass 0.
inline constexpr unsigned kLateBins(unsigned refinements) {
    return 4 * static_cast<unsigned>(most_late(refinements) + 1);
}
inline constexpr unsigned kBins(unsigned refinements) {
    return kLateBins(refinements) + 4 * static_cast<unsigned>(power_of_three(refinements));
}
inline constexpr unsigned kMaxBins = kBins(kMaxRefinements);

// What a backend may count while it makes digits, in a form of its own; of so many places at most.
inline constexpr size_t kTally = 64, kTallyPlaces = 31;

// Rows of floats to digits. A code has 3 bits for each refinement, the first one lowest: 4 for a
// value that was significant before, plus the digit. A symbol is that of pass 0.
struct QuantizeJob {
    const float* rows;
    size_t count;
    float weight;          // value = (element * weight - mean) * inverse
    const float* mean;     // one per row
    float inverse;         // of the finest step
    const uint32_t* keep;  // a row: all ones, or 0 for tokens that are coded as zeros
    uint16_t* codes;
    uint8_t* symbols;
    uint16_t* bins;  // of the error histograms, or null
    float* largest;  // a row: grows to the largest magnitude
    uint8_t* tallies = nullptr;  // kTally for each row: grow, where LadderEncodeRows::tallies; or null
};

// A model of pass 0 as the encoder needs it: the parts of the slots as in InverseTable, those that
// continue one another joined, so that `rounds` of binary search find one.
struct alignas(64) CoarseEncodeTable {
    uint16_t freq[32], first[32];
    uint16_t begin[64], shift[64];
    float reciprocal[32];
};
// Both contexts of a model of a later pass, entry 4 * context + digit. The slot of a rank is
// rank + base, + more[0] from bound[0] on, + more[1] from bound[1] on, modulo 2^16. Entries repeat,
// so that it does not matter what is above the three bits of an index.
struct alignas(64) RefineEncodeTable {
    uint16_t freq[32], base[32], bound[2][32], more[2][32];
    float reciprocal[16];
};

// One stream of one pass, backwards. Words are written upwards, so they come out in the reverse of
// their order in the body; there is room for kLanes more of them than there are.
struct PassRun {
    uint32_t state[kLanes];  // by element
    uint16_t* words;
    const uint16_t* models;  // one per step: a row of the ladder's tables
};

// Steps of one place, for all passes side by side.
struct StepsJob {
    const uint16_t* codes;
    const uint8_t* symbols;  // no larger than the escape index of their models
    size_t steps;
    unsigned lanes;
    unsigned refinements;
    unsigned rounds;  // 3, 5 or 6: enough for all coarse models of these steps; 0: not pass 0
    const CoarseEncodeTable* coarse;
    const RefineEncodeTable* refine;
    PassRun* runs;  // pass 0, then the refinements
};

struct LadderEncodeRows {
    // Elements of kLanes rows of memory, `count` in each, as `count` rows of floats.
    void (*read_tile[kKVTypes])(const std::byte* const* memory, size_t count, float* rows);
    // RoPE backwards: cos and sin are `half` rows, `stride` floats apart.
    void (*turn_back)(float* rows, size_t half, bool interleaved, const float* cos,
                      const float* sin, size_t stride);
    // With d = element * weight - centre where kept, else 0: sums += d, norms += d * d. largest: a
    // row, bits of the largest magnitude; NaN > Inf > every number.
    void (*survey_rows)(const float* rows, size_t count, float weight, const float* centre,
                        const uint32_t* keep, float* sums, float* norms, uint32_t* largest);
    void (*quantize_rows[kMaxPasses])(const QuantizeJob& job);
    // Counts of one channel: kMaxCounts numbers, those of pass 0 first. Its rows are `stride`
    // elements apart. tally: what quantize_rows counted of it, or null.
    void (*count_channel)(const uint16_t* codes, const uint8_t* symbols, const uint8_t* tally,
                          size_t places, size_t stride, unsigned refinements, uint32_t* counts);
    bool tallies[kMaxPasses];  // whether quantize_rows with so many refinements counts
    // lengths[way] = sum of counts * costs, below 2^32; costs are rows of pairs: [n / 2][way][2].
    // Returns the first way with the least length.
    unsigned (*code_lengths)(const uint16_t* counts, const int16_t* costs, size_t size,
                         uint32_t* lengths);
    // Jobs of so many streams, 1 or 2, that differ in lanes, data and runs only.
    void (*encode_steps)(const StepsJob* jobs, size_t count);
    void (*order_statistics)(const float* values, size_t rows, size_t columns, size_t rank,
                             float* out, float* following);
};

}  // namespace cachegen
