// The encoder's loops over a row of coefficients as plain C++ for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "float_bits.h"
#include "ladder_encode.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

constexpr float kDeadZone = 0.6f, kInside = 0.4f, kLateWidth = 1.2f;

// Both sides are computed, so that the loop has no branch.
inline float choose(bool condition, float yes, float no) {
    return float_from_bits(select(condition, bits_from_float(yes), bits_from_float(no)));
}

void climb_row(const float* values, size_t size, int16_t* coarse, uint8_t* const* digits,
               size_t refinements) {
    constexpr size_t kPart = 64;
    float magnitude[kPart], low[kPart], width[kPart];
    int32_t significant[kPart];
    for (size_t begin = 0; begin < size; begin += kPart) {
        const size_t count = std::min(kPart, size - begin);
        const float* from = values + begin;
        auto step = static_cast<float>(power_of_three(static_cast<unsigned>(refinements)));
        for (size_t i = 0; i < count; ++i) {
            magnitude[i] = std::fabs(from[i]);
            const float place = magnitude[i] / step + kInside;
            const auto index = static_cast<int32_t>(choose(place < 127.5f, place, 127.5f));
            const int32_t minus = -static_cast<int32_t>(from[i] < 0);
            coarse[begin + i] = static_cast<int16_t>((index ^ minus) - minus);
            significant[i] = index > 0;
            low[i] = (static_cast<float>(index) - kInside) * step;
            width[i] = step;
        }
        for (size_t pass = 0; pass < refinements; ++pass) {
            step /= 3.0f;
            uint8_t* out = digits[pass] + begin;
            const float edge = kDeadZone * step, late = kLateWidth * step;
            for (size_t i = 0; i < count; ++i) {
                const float third_width = width[i] / 3.0f;
                const float inside = (magnitude[i] - low[i]) / third_width;
                const int32_t third = (inside >= 1.0f) + (inside >= 2.0f);
                const bool was = significant[i];
                const int32_t fresh = !was & (magnitude[i] >= edge);
                const int32_t away = from[i] < 0 ? -1 : 1;
                const int32_t first = 1 + (fresh ? away : 0);
                out[i] = static_cast<uint8_t>(was ? third : first);
                low[i] = choose(was, low[i] + static_cast<float>(third) * third_width, edge);
                width[i] = choose(was, third_width, late);
                significant[i] |= fresh;
            }
        }
    }
}

// Squared errors of a row after each pass. early, late: a row of channels for each pass.
void error_row(const float* values, size_t size, const int16_t* coarse,
               const uint8_t* const* digits, size_t refinements, const float* early,
               const float* late, double* errors) {
    constexpr size_t kPart = 64;
    int32_t value[kPart];
    for (size_t begin = 0; begin < size; begin += kPart) {
        const size_t count = std::min(kPart, size - begin);
        for (size_t i = 0; i < count; ++i) value[i] = coarse[begin + i];
        for (size_t pass = 0; pass <= refinements; ++pass) {
            const int32_t limit = power_of_three(static_cast<unsigned>(pass));
            if (pass) {
                const uint8_t* digit = digits[pass - 1] + begin;
                for (size_t i = 0; i < count; ++i) {
                    const int32_t v = value[i], d = digit[i];
                    const int32_t twice = d << ((v < 0 ? -v : v) < limit / 3);
                    const int32_t away = v < 0 ? -twice : twice;
                    value[i] = 3 * v + (v ? away : d - 1);
                }
            }
            const auto step =
                static_cast<float>(power_of_three(static_cast<unsigned>(refinements - pass)));
            const float* const e = early + pass * size + begin;
            const float* const l = late + pass * size + begin;
            double sums[8] = {};
            const auto error_of = [&](size_t i) {
                const int32_t v = value[i];
                const int32_t size_of = v < 0 ? -v : v;
                const bool is_late = size_of < limit;
                const float m = static_cast<float>(size_of);
                const float cell = choose(is_late, m * kDeadZone + l[i], m + e[i]);
                const float x = choose(v == 0, 0.0f, cell) * step;
                const float difference = choose(v < 0, -x, x) - values[begin + i];
                return static_cast<double>(difference) * static_cast<double>(difference);
            };
            size_t i = 0;
            for (; i + 8 <= count; i += 8)
                for (size_t k = 0; k < 8; ++k) sums[k] += error_of(i + k);
            for (; i < count; ++i) sums[0] += error_of(i);
            for (const double sum : sums) errors[pass] += sum;
        }
    }
}

// The value of rank `rank` of every column, counted from 0, and the one behind it, by binary search
// in the order of the floats' bits.
void order_statistics(const float* values, size_t rows, size_t columns, size_t rank, float* out,
                      float* following) {
    constexpr size_t kPart = 32;
    // Floats ordered as signed integers: the magnitude bits of negative ones are turned over.
    const auto key_of = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
    std::vector<int32_t> keys(rows * kPart);
    for (size_t begin = 0; begin < columns; begin += kPart) {
        const size_t count = std::min(kPart, columns - begin);
        for (size_t r = 0; r < rows; ++r)
            for (size_t c = 0; c < count; ++c)
                keys[r * kPart + c] =
                    key_of(static_cast<int32_t>(bits_from_float(values[r * columns + begin + c])));
        int32_t low[kPart], high[kPart], below[kPart], next[kPart];
        std::fill_n(low, kPart, INT32_MIN);
        std::fill_n(high, kPart, INT32_MAX);
        for (int bit = 0; bit < 32; ++bit) {
            int32_t middle[kPart];
            // The mean, rounded down, without overflow.
            for (size_t c = 0; c < kPart; ++c)
                middle[c] = (low[c] & high[c]) + ((low[c] ^ high[c]) >> 1);
            std::fill_n(below, kPart, 0);
            for (size_t r = 0; r < rows; ++r)
                for (size_t c = 0; c < kPart; ++c) below[c] += keys[r * kPart + c] <= middle[c];
            for (size_t c = 0; c < kPart; ++c) {
                const bool enough = below[c] > static_cast<int32_t>(rank);
                const bool done = low[c] == high[c];
                high[c] = enough ? middle[c] : high[c];
                low[c] = enough || done ? low[c] : middle[c] + 1;
            }
        }
        std::fill_n(below, kPart, 0);
        std::fill_n(next, kPart, INT32_MAX);
        for (size_t r = 0; r < rows; ++r) {
            for (size_t c = 0; c < kPart; ++c) {
                const int32_t key = keys[r * kPart + c];
                below[c] += key <= high[c];
                next[c] = key > high[c] && key < next[c] ? key : next[c];
            }
        }
        for (size_t c = 0; c < count; ++c) {
            const bool twice = below[c] > static_cast<int32_t>(rank) + 1;
            out[begin + c] = float_from_bits(static_cast<uint32_t>(key_of(high[c])));
            following[begin + c] =
                float_from_bits(static_cast<uint32_t>(key_of(twice ? high[c] : next[c])));
        }
    }
}

constexpr LadderEncodeRows encode_rows() { return {climb_row, error_row, order_statistics}; }

}  // namespace
}  // namespace cachegen
