// The entropy coder of all passes of `progressive`, one lane after the other: the pattern for the
// vector kernels, and what backends without one use.
#pragma once

#include <array>

#include "encode_kernels.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

// ceil(2^44 / f). For x < f * 2^20, which is what the encoder divides, (x * reciprocal) >> 44 is
// exactly x / f: the product fits 64 bits, and it is too large by less than x / 2^44 < 1 / f.
constexpr unsigned kStepReciprocalBits = 44;
constexpr auto kStepReciprocals = [] {
    std::array<uint64_t, kTotal + 1> table{};
    for (uint64_t f = 1; f <= kTotal; ++f)
        table[f] = ((uint64_t{1} << kStepReciprocalBits) + f - 1) / f;
    return table;
}();

// Makes room for a symbol of this frequency in a state, then divides: the state becomes the
// quotient, the rank is returned. The word is written always and kept only if the pointer moves.
inline uint32_t divide_state(uint32_t& state, uint32_t freq, uint16_t*& words) {
    const unsigned spill = state >= uint64_t{freq} << 20;
    *words = static_cast<uint16_t>(state);
    words += spill;
    state >>= 16 * spill;
    const auto quotient =
        static_cast<uint32_t>(state * kStepReciprocals[freq] >> kStepReciprocalBits);
    const uint32_t rank = state - quotient * freq;
    state = quotient << kProbBits;
    return rank;
}

inline void encode_stream_steps(const StepsJob& job) {
    for (size_t step = job.steps; step-- > 0;) {
        const uint8_t* const symbols = job.symbols + step * kLanes;
        const uint16_t* const codes = job.codes + step * kLanes;
        for (unsigned pass = job.rounds ? 0 : 1; pass <= job.refinements; ++pass) {
            PassRun& run = job.runs[pass];
            const size_t model = run.models[step];
            uint16_t* words = run.words;
            for (unsigned e = kLanes - job.lanes; e < kLanes; ++e) {
                uint32_t& state = run.state[e];
                if (pass == 0) {
                    const CoarseEncodeTable& table = job.coarse[model];
                    const unsigned symbol = symbols[e];
                    const uint32_t rank = divide_state(state, table.freq[symbol], words);
                    const uint32_t position = table.first[symbol] + rank;
                    unsigned part = 0;
                    for (unsigned half = 32; half; half /= 2)
                        part += half * (table.begin[part + half] <= position);
                    state |= static_cast<uint16_t>(position + table.shift[part]);
                } else {
                    const RefineEncodeTable& table = job.refine[model];
                    const unsigned entry = codes[e] >> (3 * (pass - 1)) & 7;
                    const uint32_t rank = divide_state(state, table.freq[entry], words);
                    uint32_t slot = rank + table.base[entry];
                    for (unsigned i = 0; i < 2; ++i)
                        slot += rank >= table.bound[i][entry] ? table.more[i][entry] : 0u;
                    state |= static_cast<uint16_t>(slot);
                }
            }
            run.words = words;
        }
    }
}

[[maybe_unused]] void encode_steps(const StepsJob* jobs, size_t count) {
    for (size_t i = 0; i < count; ++i) encode_stream_steps(jobs[i]);
}

}  // namespace
}  // namespace cachegen
