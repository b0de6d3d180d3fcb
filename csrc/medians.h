// Medians of the columns of a matrix, for calibration.
#pragma once

#include <cstddef>

namespace cachegen {

// The median of every column of a matrix: of an even number the mean of the two in the middle.
void column_medians(const float* values, size_t rows, size_t columns, float* medians);

}  // namespace cachegen
