// What the encoder of `progressive` needs beside the entropy coder: digits, statistics, medians.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ladder.h"

namespace cachegen {

// A matrix of coefficients and its digits, rows of `channels`. digits: of passes 1, 2, ...
struct LadderMatrix {
    size_t tokens, channels;
    const float* values;  // in finest steps
    int16_t* coarse;
    std::span<uint8_t* const> digits;
};

// Fills coarse and digits. The float operations are those of ladder.climb in Python, one by one.
void climb(const LadderMatrix& matrix);

// Counts per channel: magnitudes of pass 0, 0 to 16 and more, in 17 numbers, then for each later
// pass (context, digit) in 6. counts: channels * (17 + 6 * digits.size()).
void count_digits(const LadderMatrix& matrix, uint32_t* counts);

// Squared error after every pass, for several ways to reconstruct: offsets[(way * passes + pass) * 2
// + late] is a row of 64 numbers by class, in steps of that pass. Every `stride`th row counts.
// errors: ways * passes.
void ladder_errors(const LadderMatrix& matrix, const uint8_t* classes, const float* offsets,
                   size_t ways, size_t stride, double* errors);

// The median of every column of a matrix: of an even number the mean of the two in the middle.
void column_medians(const float* values, size_t rows, size_t columns, float* medians);

}  // namespace cachegen
