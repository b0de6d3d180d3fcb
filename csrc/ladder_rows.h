// The loops of the `progressive` decoder as plain C++ for the compiler to vectorise. A backend that
// includes this file gets them compiled for its own instruction set.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "float_bits.h"
#include "ladder.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

[[maybe_unused]] void find_bytes(const uint8_t* block, const uint8_t* wanted, size_t steps, uint32_t* found) {
    for (size_t step = 0; step < steps; ++step) {
        uint32_t lanes = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane)
            lanes |= static_cast<uint32_t>(block[step * kLanes + lane] == wanted[step]) << lane;
        found[step] = lanes;
    }
}

// Symbols of pass 0: 0, -1, 1, -2, 2, ...
void coarse_values(const uint8_t* symbols, size_t steps, int16_t* values) {
    for (size_t i = 0; i < steps * kLanes; ++i) {
        const auto symbol = static_cast<int16_t>(symbols[i]);
        const auto magnitude = static_cast<int16_t>((symbol + 1) >> 1);
        const auto minus = static_cast<int16_t>(-(symbol & 1));  // all ones for a negative value
        values[i] = static_cast<int16_t>((magnitude ^ minus) - minus);
    }
}

void value_contexts(const int16_t* values, size_t steps, uint8_t* contexts) {
    for (size_t i = 0; i < steps * kLanes; ++i) contexts[i] = values[i] != 0;
}

// late_below: 3^k before this pass.
void refine_values(const uint8_t* digits, int late_below, size_t steps, int16_t* values) {
    const auto limit = static_cast<int16_t>(late_below);
    for (size_t i = 0; i < steps * kLanes; ++i) {
        const int16_t v = values[i];
        const auto digit = static_cast<int16_t>(digits[i]);
        const auto minus = static_cast<int16_t>(v >> 15);
        const auto magnitude = static_cast<int16_t>((v ^ minus) - minus);
        const auto twice = static_cast<int16_t>(digit << (magnitude < limit));
        const auto away = static_cast<int16_t>((twice ^ minus) - minus);
        const auto first = static_cast<int16_t>(digit - 1);
        values[i] = static_cast<int16_t>(3 * v + (v ? away : first));
    }
}

// The floats of values of one channel, before RoPE.
inline void scale_values(const UnitJob& job, size_t row, const int16_t* values, float* out) {
    for (unsigned lane = 0; lane < kLanes; ++lane) out[lane] = scale_value(job, row, values[lane]);
}

inline void scale_row(const UnitJob& job, size_t row, float* out) {
    scale_values(job, row, job.values + row * kLanes, out);
}

template <KVType kType>
inline void convert_row(const float* row, typename KVTraits<kType>::Bits* out) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        float value = row[lane];
        if constexpr (kType == KVType::Float16) {
            // A value near the end of the range may overshoot it.
            value = value > 65504.0f ? 65504.0f : value;
            value = value < -65504.0f ? -65504.0f : value;
        }
        out[lane] = KVTraits<kType>::from_float(value);
    }
}

template <KVType kType>
void fill_lookup(const UnitJob& job, void* lookup) {
    alignas(64) float row[kLanes];
    for (size_t i = 0; i < job.size; ++i) {
        scale_values(job, i, kLookup, row);
        if (job.cos)
            std::memcpy(static_cast<float*>(lookup) + i * kLanes, row, sizeof row);
        else
            convert_row<kType>(row, static_cast<typename KVTraits<kType>::Bits*>(lookup) + i * kLanes);
    }
}

// job.scratch: a row of kLanes elements for each dimension.
template <KVType kType>
void convert_unit(const UnitJob& job) {
    using Bits = typename KVTraits<kType>::Bits;
    auto* const out = static_cast<Bits*>(job.scratch);
    const size_t pairs = job.cos ? job.half : 0;
    for (size_t i = 0; i < pairs; ++i) {
        const size_t first = job.interleaved ? 2 * i : i;
        const size_t second = job.interleaved ? 2 * i + 1 : i + pairs;
        alignas(64) float a[kLanes], b[kLanes], x[kLanes], y[kLanes];
        scale_row(job, first, a);
        scale_row(job, second, b);
        const float *cos = job.cos + i * kLanes, *sin = job.sin + i * kLanes;
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            x[lane] = a[lane] * cos[lane] - b[lane] * sin[lane];
            y[lane] = b[lane] * cos[lane] + a[lane] * sin[lane];
        }
        convert_row<kType>(x, out + first * kLanes);
        convert_row<kType>(y, out + second * kLanes);
    }
    for (size_t row = 2 * pairs; row < job.size; ++row) {
        alignas(64) float a[kLanes];
        scale_row(job, row, a);
        convert_row<kType>(a, out + row * kLanes);
    }
}

// Turns `size` rows of kLanes elements into one row for each lane.
template <class Bits>
void store_rows(const void* scratch, size_t size, std::byte* const* rows) {
    const auto* from = static_cast<const Bits*>(scratch);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (!rows[lane]) continue;
        for (size_t i = 0; i < size; ++i)
            std::memcpy(rows[lane] + i * sizeof(Bits), &from[i * kLanes + lane], sizeof(Bits));
    }
}

// Rows of a unit as floats in lane order, `stride` floats apart; zeros where all lanes are zero.
// used[row] is set where not all are.
void scale_rows(const UnitJob& job, float* out, size_t stride, uint8_t* used) {
    for (size_t row = 0; row < job.size; ++row, out += stride) {
        const int16_t* values = job.values + row * kLanes;
        unsigned any = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) any |= static_cast<uint16_t>(values[lane]);
        used[row] = any != 0;
        if (any)
            scale_row(job, row, out);
        else
            std::memset(out, 0, kLanes * sizeof(float));
    }
}

// One head of one token: RoPE, rounding. channel(i): the float of dimension i.
template <KVType kType, class Channel>
inline void finish_channels(const Channel& channel, size_t size, const float* cos,
                            const float* sin, size_t pairs, bool interleaved,
                            typename KVTraits<kType>::Bits* out) {
    using Bits = typename KVTraits<kType>::Bits;
    constexpr size_t kPart = 128;
    const auto convert = [](float value) {
        if constexpr (kType == KVType::Float16) {
            value = value > 65504.0f ? 65504.0f : value;
            value = value < -65504.0f ? -65504.0f : value;
        }
        return KVTraits<kType>::from_float(value);
    };
    if (interleaved) {
        for (size_t i = 0; i < pairs; ++i) {
            const float a = channel(2 * i), b = channel(2 * i + 1);
            out[2 * i] = convert(a * cos[i] - b * sin[i]);
            out[2 * i + 1] = convert(b * cos[i] + a * sin[i]);
        }
    } else {
        for (size_t begin = 0; begin < pairs; begin += kPart) {
            // Buffers, because the compiler cannot know that `out` is none of the inputs.
            Bits first[kPart], second[kPart];
            const size_t count = std::min(kPart, pairs - begin);
            for (size_t k = 0; k < count; ++k) {
                const size_t i = begin + k;
                const float a = channel(i), b = channel(i + pairs);
                first[k] = convert(a * cos[i] - b * sin[i]);
                second[k] = convert(b * cos[i] + a * sin[i]);
            }
            std::memcpy(out + begin, first, count * sizeof(Bits));
            std::memcpy(out + pairs + begin, second, count * sizeof(Bits));
        }
    }
    for (size_t begin = 2 * pairs; begin < size; begin += kPart) {
        Bits part[kPart];
        const size_t count = std::min(kPart, size - begin);
        for (size_t k = 0; k < count; ++k) part[k] = convert(channel(begin + k));
        std::memcpy(out + begin, part, count * sizeof(Bits));
    }
}

template <KVType kType>
void finish_row(const RowsJob& job) {
    const auto channel = [&](size_t i) { return (job.values[i] + job.mean[i]) * job.factor; };
    finish_channels<kType>(channel, job.size, job.cos, job.sin, job.cos ? job.half : 0,
                           job.interleaved,
                           static_cast<typename KVTraits<kType>::Bits*>(job.row));
}

template <KVType kType>
void turn_means(const MeansJob& job) {
    const auto channel = [&](size_t i) { return job.mean[i]; };
    for (uint32_t lanes = job.lanes; lanes; lanes &= lanes - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
        const float* const cos = job.angles + 2 * job.half * lane;
        finish_channels<kType>(
            channel, job.size, cos, cos + job.half, job.half, job.interleaved,
            reinterpret_cast<typename KVTraits<kType>::Bits*>(job.rows[lane]));
    }
}

[[maybe_unused]] void find_values(const int16_t* values, size_t rows, uint32_t* found) {
    for (size_t row = 0; row < rows; ++row, values += kLanes) {
        uint32_t lanes = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane)
            lanes |= static_cast<uint32_t>(values[lane] != 0) << lane;
        found[row] = lanes;
    }
}

inline constexpr uint8_t kLanesInOrder[kLanes] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

template <KVType kType>
void finish_unit(const UnitJob& job) {
    convert_unit<kType>(job);
    store_rows<typename KVTraits<kType>::Bits>(job.scratch, job.size, job.rows);
}

}  // namespace
}  // namespace cachegen
