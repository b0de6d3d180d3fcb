// Statistics of the channels of a symbol matrix, and the models that the encoder chooses from them.
// codec/entropy.py says the same in NumPy, with equal results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace cachegen {

struct SymbolMatrix {
    size_t tokens, channels;
    const uint8_t* symbols;  // row by row
};

// Counts values `symbol >> shift` of each channel: channels * alphabet. Larger ones are left out.
void count_symbols(const SymbolMatrix& matrix, unsigned shift, size_t alphabet, uint32_t* counts);

// Scales rows of `alphabet` counts to frequencies that sum to 4096, none that occurs being 0.
// bits_saved: for f from 0 to 4096 log2((f + 1) / f), as the caller computes it; [0] is not read.
void normalize_counts(std::span<const uint32_t> counts, size_t alphabet,
                      std::span<const double> bits_saved, uint16_t* freqs);

// Chooses for each channel the frozen table and the rotation with the shortest code.
// counts: channels * 32. costs: in 1/1024 bit, (16, classes, 2) for pairs of 32 values and up to 128
// classes.
void fit_classes(std::span<const uint32_t> counts, std::span<const int16_t> costs, size_t classes,
                 uint8_t* chosen, uint8_t* rotations);

}  // namespace cachegen
