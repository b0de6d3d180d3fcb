// Medians of columns as plain C++ for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "float_bits.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

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

}  // namespace
}  // namespace cachegen
