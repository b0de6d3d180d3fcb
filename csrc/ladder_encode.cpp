#include "ladder_encode.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "dispatch.h"

namespace cachegen {
namespace {

using DigitRows = std::array<uint8_t*, kMaxPasses>;

DigitRows digits_of(const LadderMatrix& matrix, size_t row) {
    DigitRows rows{};
    for (size_t j = 0; j < matrix.digits.size(); ++j)
        rows[j] = matrix.digits[j] + row * matrix.channels;
    return rows;
}

}  // namespace

void climb(const LadderMatrix& matrix) {
    const LadderEncodeRows& rows = kernels().encode_rows;
    for (size_t row = 0; row < matrix.tokens; ++row) {
        const size_t at = row * matrix.channels;
        rows.climb(matrix.values + at, matrix.channels, matrix.coarse + at,
                   digits_of(matrix, row).data(), matrix.digits.size());
    }
}

void count_digits(const LadderMatrix& matrix, uint32_t* counts) {
    const size_t width = 17 + 6 * matrix.digits.size();
    for (size_t row = 0; row < matrix.tokens; ++row) {
        const int16_t* coarse = matrix.coarse + row * matrix.channels;
        const DigitRows digits = digits_of(matrix, row);
        for (size_t c = 0; c < matrix.channels; ++c) {
            uint32_t* const of = counts + c * width;
            const int magnitude = std::abs(static_cast<int>(coarse[c]));
            ++of[std::min(magnitude, 16)];
            unsigned seen = magnitude != 0;
            for (size_t j = 0; j < matrix.digits.size(); ++j) {
                const unsigned digit = digits[j][c];
                ++of[17 + 6 * j + 3 * seen + digit];
                seen |= digit != 1;
            }
        }
    }
}

void ladder_errors(const LadderMatrix& matrix, const uint8_t* classes, const float* offsets,
                   size_t ways, size_t stride, double* errors) {
    const LadderEncodeRows& rows = kernels().encode_rows;
    const size_t passes = matrix.digits.size() + 1, n = matrix.channels;
    std::vector<float> early(passes * n), late(passes * n);
    for (size_t way = 0; way < ways; ++way) {
        for (size_t pass = 0; pass < passes; ++pass) {
            const float* const by_class = offsets + (way * passes + pass) * 2 * 64;
            for (size_t c = 0; c < n; ++c) {
                early[pass * n + c] = by_class[classes[c]];
                late[pass * n + c] = by_class[64 + classes[c]];
            }
        }
        double* const sums = errors + way * passes;
        std::fill_n(sums, passes, 0.0);
        for (size_t row = 0; row < matrix.tokens; row += stride)
            rows.errors(matrix.values + row * n, n, matrix.coarse + row * n,
                        digits_of(matrix, row).data(), passes - 1, early.data(), late.data(),
                        sums);
    }
}

void column_medians(const float* values, size_t rows, size_t columns, float* medians) {
    if (rows == 0) return;
    std::vector<float> following(columns);
    const auto find = kernels().encode_rows.order_statistics;
    find(values, rows, columns, (rows - 1) / 2, medians, following.data());
    if (rows % 2) return;
    for (size_t c = 0; c < columns; ++c) medians[c] = (medians[c] + following[c]) / 2.0f;
}

}  // namespace cachegen
