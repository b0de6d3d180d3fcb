// The encoder's loops over rows as plain C++ for the compiler to vectorise. A backend that includes
// this file gets them compiled for its own instruction set, and replaces what it can do better.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "encode_kernels.h"
#include "encode_steps.h"
#include "order_statistics.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

constexpr float kDeadZone = 0.6f, kInside = 0.4f;
constexpr float kPerLateCell = 1 / 1.2f;

template <KVType kType>
void read_tile(const std::byte* const* memory, size_t count, float* rows) {
    using Bits = typename KVTraits<kType>::Bits;
    for (unsigned e = 0; e < kLanes; ++e) {
        for (size_t i = 0; i < count; ++i) {
            Bits bits;
            std::memcpy(&bits, memory[e] + i * sizeof bits, sizeof bits);
            float value = KVTraits<kType>::to_float(bits);
            if constexpr (kType == KVType::Float16) {
                // That conversion is for finite values; others must be noticed.
                const bool finite = (bits & KVTraits<kType>::kMagnitude) <= KVTraits<kType>::kLargest;
                value = float_from_bits(bits_from_float(value) | select(finite, 0, 0x7f800000));
            }
            rows[i * kLanes + e] = value;
        }
    }
}

void turn_back(float* rows, size_t half, bool interleaved, const float* cos, const float* sin,
               size_t stride) {
    for (size_t i = 0; i < half; ++i) {
        float* const first = rows + (interleaved ? 2 * i : i) * kLanes;
        float* const second = rows + (interleaved ? 2 * i + 1 : i + half) * kLanes;
        const float *c = cos + i * stride, *s = sin + i * stride;
        float a[kLanes], b[kLanes];
        for (unsigned e = 0; e < kLanes; ++e) {
            a[e] = first[e] * c[e] - second[e] * s[e];
            b[e] = second[e] * c[e] + first[e] * s[e];
        }
        std::memcpy(first, a, sizeof a);
        std::memcpy(second, b, sizeof b);
    }
}

// Both sides are computed, so that the loop has no branch.
inline float choose(bool condition, float yes, float no) {
    return float_from_bits(select(condition, bits_from_float(yes), bits_from_float(no)));
}

inline float kept(float value, uint32_t keep) {
    return float_from_bits(bits_from_float(value) & keep);
}

void survey_rows(const float* rows, size_t count, float weight, const float* centre,
                 const uint32_t* keep, float* sums, float* norms, uint32_t* largest) {
    float norm[kLanes];
    uint32_t most[kLanes];
    std::memcpy(norm, norms, sizeof norm);
    std::memcpy(most, largest, sizeof most);
    for (size_t row = 0; row < count; ++row, rows += kLanes, sums += kLanes) {
        for (unsigned e = 0; e < kLanes; ++e) {
            const float value = rows[e] * weight;
            const uint32_t magnitude = bits_from_float(value) & 0x7fffffff;
            most[e] = most[e] < magnitude ? magnitude : most[e];
            const float d = kept(value - centre[row], keep[e]);
            sums[e] += d;
            norm[e] += d * d;
        }
    }
    std::memcpy(norms, norm, sizeof norm);
    std::memcpy(largest, most, sizeof most);
}

// A value, in finest steps, is early if it is significant in pass 0: its magnitude plus 0.4 steps
// of pass 0, cut to an integer, is at least one such step. The quotient is the index, the remainder
// has the digits, in base 3. Else it is round(magnitude / 1.2), of which balanced ternary digits
// are what the passes say (docs/fused-encode.md).
template <unsigned R>
void quantize_rows(const QuantizeJob& job) {
    constexpr int kStep = power_of_three(R);
    constexpr float kShift = kInside * static_cast<float>(kStep);
    constexpr auto kMost = static_cast<float>((kMaxCoarse + 1) * kStep);
    constexpr auto kHalf = static_cast<uint16_t>(most_late(R));
    const float* rows = job.rows;
    float largest[kLanes];
    std::memcpy(largest, job.largest, sizeof largest);
    for (size_t row = 0; row < job.count; ++row, rows += kLanes) {
        uint16_t early[kLanes], late[kLanes], negative[kLanes], quarter[kLanes];
        const float mean = job.mean[row];
        for (unsigned e = 0; e < kLanes; ++e) {
            const float value = kept((rows[e] * job.weight - mean) * job.inverse, job.keep[e]);
            const float exact = std::fabs(value);
            largest[e] = choose(largest[e] < exact, exact, largest[e]);
            const float magnitude = choose(exact < kMost, exact, kMost);
            // With two more bits for the error histograms; a factor of 4 rounds nothing.
            const auto shifted = static_cast<int32_t>(4.0f * (magnitude + kShift));
            const auto rounded = static_cast<int32_t>(4.0f * (magnitude * kPerLateCell + 0.5f));
            const int32_t bounded = shifted < 4 * 128 * kStep ? shifted : 4 * 128 * kStep - 1;
            const int32_t low = rounded < 4 * (kHalf + 1) ? rounded : 4 * (kHalf + 1) - 1;
            early[e] = static_cast<uint16_t>(bounded >> 2);
            late[e] = static_cast<uint16_t>(low >> 2);
            quarter[e] = static_cast<uint16_t>(
                select(shifted >= 4 * kStep, static_cast<uint32_t>(bounded),
                       static_cast<uint32_t>(low)) & 3);
            // The sign bit: a negative zero has no digit that a sign could change.
            negative[e] =
                static_cast<uint16_t>(static_cast<int32_t>(bits_from_float(value)) >> 31);
        }
        uint16_t rest[kLanes], significant[kLanes];
        uint8_t* const symbols = job.symbols + row * kLanes;
        for (unsigned e = 0; e < kLanes; ++e) {
            const auto index = static_cast<uint16_t>(early[e] / kStep);
            const auto is_early = static_cast<uint16_t>(-static_cast<int32_t>(index != 0));
            const auto inside = static_cast<uint16_t>(early[e] - index * kStep);
            const auto outside = static_cast<uint16_t>(late[e] + kHalf);
            rest[e] = static_cast<uint16_t>((inside & is_early) | (outside & ~is_early));
            significant[e] = is_early;
            symbols[e] = static_cast<uint8_t>(2 * index + (negative[e] & is_early));
        }
        if (job.bins) {
            uint16_t* const bins = job.bins + row * kLanes;
            for (unsigned e = 0; e < kLanes; ++e) {
                const auto in_cell = static_cast<uint16_t>(kLateBins(R) + 4 * rest[e]);
                const auto in_late = static_cast<uint16_t>(4 * late[e]);
                bins[e] = static_cast<uint16_t>(
                    quarter[e] + ((in_cell & significant[e]) | (in_late & ~significant[e])));
            }
        }
        uint16_t* const codes = job.codes + row * kLanes;
        for (unsigned e = 0; e < kLanes; ++e) {
            auto left = rest[e];
            uint16_t seen = significant[e];
            unsigned code = 0;
#pragma GCC unroll 5
            for (unsigned pass = 1; pass <= R; ++pass) {
                const auto unit = static_cast<uint16_t>(power_of_three(R - pass));
                const auto digit = static_cast<uint16_t>(left / unit);
                left = static_cast<uint16_t>(left - digit * unit);
                // Two for a value that becomes significant here, less two if it is negative.
                const auto sign = static_cast<uint16_t>(negative[e] & ~seen & (digit & 2));
                code |= static_cast<unsigned>((digit - sign) | (seen & 4)) << (3 * (pass - 1));
                seen |= static_cast<uint16_t>(-static_cast<int32_t>(digit != 1));
            }
            codes[e] = static_cast<uint16_t>(code);
        }
    }
    std::memcpy(job.largest, largest, sizeof largest);
}

void count_channel(const uint16_t* codes, const uint8_t* symbols, const uint8_t*, size_t places,
                   size_t stride, unsigned refinements, uint32_t* counts) {
    std::fill_n(counts, kMaxCounts, 0u);
    for (size_t place = 0; place < places; ++place, codes += stride, symbols += stride) {
        for (unsigned e = 0; e < kLanes; ++e) {
            ++counts[std::min((symbols[e] + 1) / 2, 16)];
            for (unsigned pass = 0; pass < refinements; ++pass) {
                const unsigned field = codes[e] >> (3 * pass) & 7;
                ++counts[kCoarseCounts + kRefineCounts * pass + field - (field >> 2)];
            }
        }
    }
}

unsigned code_lengths(const uint16_t* counts, const int16_t* costs, size_t size, uint32_t* lengths) {
    std::fill_n(lengths, kWays, 0u);
    for (size_t pair = 0; pair < size / 2; ++pair, costs += 2 * kWays) {
        const uint32_t first = counts[2 * pair], second = counts[2 * pair + 1];
        if (!(first | second)) continue;
        for (unsigned way = 0; way < kWays; ++way)
            lengths[way] += first * static_cast<uint32_t>(costs[2 * way]) +
                            second * static_cast<uint32_t>(costs[2 * way + 1]);
    }
    return static_cast<unsigned>(std::min_element(lengths, lengths + kWays) - lengths);
}

constexpr LadderEncodeRows encode_rows() {
    return {.read_tile = {read_tile<KVType::Float16>, read_tile<KVType::BFloat16>,
                          read_tile<KVType::Float32>},
            .turn_back = turn_back,
            .survey_rows = survey_rows,
            .quantize_rows = {quantize_rows<0>, quantize_rows<1>, quantize_rows<2>,
                              quantize_rows<3>, quantize_rows<4>, quantize_rows<5>},
            .count_channel = count_channel,
            .tallies = {},
            .code_lengths = code_lengths,
            .encode_steps = encode_steps,
            .order_statistics = order_statistics};
}

}  // namespace
}  // namespace cachegen
