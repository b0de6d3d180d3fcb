// Constants and index arithmetic of FORMAT.md: lanes, places, steps and streams.
#pragma once

// Compilers of kernels at run time have no standard library; csrc/cuda/warp.cuh has the types.
#if !defined(__CUDACC__) && !defined(__HIPCC__)
#include <bit>
#include <cstddef>
#include <cstdint>

static_assert(std::endian::native == std::endian::little,
              "bodies are little-endian and are read and written in place");
#endif

namespace cachegen {

inline constexpr unsigned kLanes = 32;
inline constexpr unsigned kProbBits = 12;
inline constexpr unsigned kTotal = 1u << kProbBits;  // the frequencies of a model sum to this
inline constexpr unsigned kMaxAlphabet = 32;
inline constexpr unsigned kContextBuckets = 4;  // K, and the largest alphabet, with contexts
inline constexpr unsigned kMaxShift = 7;
inline constexpr unsigned kMaxSymbol = 255;
inline constexpr uint8_t kNoEscape = 255;
inline constexpr uint32_t kStateMin = 1u << 16;  // states live in [2^16, 2^32)
inline constexpr uint64_t kMaxStreamSteps = 1u << 24;
// An encoder writes a matrix sparsely if at most one symbol of so many is not 0: about where entropy
// coding takes as many bytes, and ten times as long.
inline constexpr uint64_t kSparseShare = 256;

inline constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// A symbol matrix of T tokens and C channels, seen as lanes, places and steps.
// Invariant, checked where one is made from outside: tokens * channels <= kMaxSymbols.
struct Shape {
    static constexpr uint64_t kMaxSymbols = uint64_t{1} << 40;

    uint64_t tokens = 0;    // T
    uint64_t channels = 0;  // C

    uint64_t places() const { return ceil_div(tokens, kLanes); }
    uint64_t steps() const { return places() * channels; }
    uint64_t streams(uint64_t stream_steps) const { return ceil_div(steps(), stream_steps); }

    // n(p): lanes 0 .. n(p)-1 hold a token at this place.
    unsigned active_lanes(uint64_t place) const {
        return static_cast<unsigned>(ceil_div(tokens - place, places()));
    }
};

}  // namespace cachegen
