// progressive's encoder, from values to statistics: rows of a group as floats, tokens that are stored
// exactly, means, energy without a profile. Every sum has the order that it has on the CPU.
#pragma once

#include "encode_plan.cuh"

namespace cachegen {

CACHEGEN_DEVICE const Source& source_of(const Launch& launch, uint32_t index) {
    return at_address<const Source>(launch.groups)[index];
}

CACHEGEN_DEVICE GroupResult& result_of(const Source& source) {
    return *at_address<GroupResult>(source.result);
}

CACHEGEN_DEVICE float* values_at(const Source& source, uint32_t token, uint32_t channel) {
    return at_address<float>(source.values) + static_cast<uint64_t>(token) * source.stride + channel;
}

// The tile of this warp, or false where the launch has no more.
CACHEGEN_DEVICE bool tile_of(const Launch& launch, Columns& tile) {
    const unsigned index = warp_of_launch();
    if (index >= launch.count) return false;
    tile = at_address<const Columns>(launch.items)[index];
    return true;
}

// What a warp leaves behind for its tile.
CACHEGEN_DEVICE double* partials_of(const Source& source, const Columns& tile) {
    return at_address<double>(source.partials) + static_cast<uint64_t>(tile.first / kTile) * kPartials;
}

CACHEGEN_DEVICE void give_up(const Launch& launch, uint32_t error, uint32_t why) {
    atomic_or(at_address<uint32_t>(launch.errors) + error, why);
}

CACHEGEN_DEVICE uint32_t power_of_three(uint32_t n) {
    uint32_t power = 1;
    for (uint32_t i = 0; i < n; ++i) power *= 3;
    return power;
}

// Bins of the error histograms of a class: of late values and zeros, then of early ones; the same as
// kLateBins and kBins in csrc/encode_kernels.h.
CACHEGEN_DEVICE uint32_t late_bins(uint32_t passes) { return 2 * (power_of_three(passes - 1) + 1); }
CACHEGEN_DEVICE uint32_t histogram_bins(uint32_t passes) {
    return late_bins(passes) + 4 * power_of_three(passes - 1);
}

// Whether a token is coded as zeros.
CACHEGEN_DEVICE bool is_exempt(const Source& source, uint32_t token) {
    return token < source.sinks || (at_address<const uint8_t>(source.marks)[token] & kExempt);
}

// Planes to rows: float, K before RoPE, V times its weight (the plane's `divisor` here).
// `extra` blocks for each plane.
CACHEGEN_KERNEL(load_values)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const uint32_t index = block_index() / launch.extra;
    const Plane& plane = at_address<const Plane>(launch.planes)[index];
    const Source& source = source_of(launch, at_address<const uint32_t>(launch.items)[index]);
    const uint32_t width = plane.heads * plane.dim;
    const uint64_t size = static_cast<uint64_t>(plane.tokens) * width;
    uint32_t wrong = 0;
    float widest = 0;
    for (uint64_t at = block_index() % launch.extra * 128 + thread_index(); at < size;
         at += launch.extra * 128) {
        const auto token = static_cast<uint32_t>(at / width);
        const auto channel = static_cast<uint32_t>(at % width), d = channel % plane.dim;
        const uint64_t row = row_address(plane, token, channel / plane.dim);
        if (!row) {
            wrong |= kBadSlot;
            continue;
        }
        const auto load = [&](uint32_t which) {
            const uint32_t bits = load_element(row + which * size_of(plane.dtype), plane.dtype);
            if (is_too_large(bits, plane.dtype)) wrong |= kBadValue;
            return value_of(bits, plane.dtype);
        };
        uint32_t pair = 0, partner = 0;
        bool is_second = false;
        float value = load(d);
        if (partner_of(plane, d, pair, partner, is_second)) {
            float2 angle = angle_of(plane, token, pair);
            angle.y = -angle.y;
            value = turned(value, load(partner), angle, is_second);
        }
        if (plane.divisor != 1) value = product(value, plane.divisor);
        if (!(magnitude_of(value) <= kLargestMagnitude)) wrong |= kBadValue;
        if (source.centre) {
            const uint32_t whole = plane.first_channel + channel;
            const float off = magnitude_of(sum(value, -at_address<const float>(source.centre)[whole]));
            widest = off > widest ? off : widest;
        }
        *values_at(source, token, plane.first_channel + channel) = value;
    }
    // Several planes may empty the same histogram; it is filled much later.
    const uint32_t bins = kClasses * histogram_bins(source.passes);
    for (uint64_t at = block_index() % launch.extra * 128 + thread_index(); at < bins;
         at += launch.extra * 128)
        at_address<uint32_t>(source.histogram)[at] = 0;
    if (wrong) give_up(launch, source.error, wrong);
    if (source.centre) atomic_max(&result_of(source).widest, as_bits(widest));
}

// ---- Without a profile: what csrc/fused_survey.cpp does, in the order in which it sums -----------

// The sum of 32 numbers, by lane: element e there is lane 31 - e.
CACHEGEN_DEVICE float sum_of_lanes(const float (&by_lane)[kLanes]) {
    float part[kLanes / 2];
CACHEGEN_UNROLL
    for (unsigned e = 0; e < 16; ++e) part[e] = sum(by_lane[31 - e], by_lane[15 - e]);
CACHEGEN_UNROLL
    for (unsigned half = 8; half; half /= 2)
CACHEGEN_UNROLL
        for (unsigned e = 0; e < 8; ++e)
            if (e < half) part[e] = sum(part[e], part[e + half]);
    return part[0];
}

// A centre for every channel, the mean of one place, and the sum of what differs from it. A lane each.
CACHEGEN_KERNEL(survey_columns)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    if (channel >= source.channels || source.deviations || result_of(source).done) return;
    const uint32_t places = (source.tokens + kLanes - 1) / kLanes, middle = places / 2;
    float by_lane[kLanes];
    uint32_t count = 0;
CACHEGEN_UNROLL
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t token = lane * places + middle;
        const bool counts = token < source.tokens && !is_exempt(source, token);
        by_lane[lane] = counts ? *values_at(source, token, channel) : 0.0f;
        count += counts;
    }
    const float centre = count ? quotient(sum_of_lanes(by_lane), static_cast<float>(count)) : 0.0f;
CACHEGEN_UNROLL
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
        by_lane[lane] = 0;
        for (uint32_t place = 0; place < places; ++place) {
            const uint32_t token = lane * places + place;
            if (token < source.tokens && !is_exempt(source, token))
                by_lane[lane] = sum(by_lane[lane], sum(*values_at(source, token, channel), -centre));
        }
    }
    at_address<float>(source.centres)[channel] = centre;
    at_address<float>(source.sums)[channel] = sum_of_lanes(by_lane);
}

// Of every token the squared distance from the centres and the largest magnitude. A lane each;
// `extra` warps for each group.
CACHEGEN_KERNEL(survey_tokens)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count * launch.extra) return;
    const Source& source = source_of(launch, launch.first + warp / launch.extra);
    if (source.deviations || result_of(source).done) return;
    const float* const centres = at_address<const float>(source.centres);
    for (uint32_t t = warp % launch.extra * kLanes + lane_index(); t < source.tokens;
         t += launch.extra * kLanes) {
        const bool counts = !is_exempt(source, t);
        float norm = 0;
        uint32_t largest = 0;
        for (uint32_t c = 0; c < source.channels; ++c) {
            const float value = *values_at(source, t, c);
            const uint32_t magnitude = as_bits(magnitude_of(value));
            largest = magnitude > largest ? magnitude : largest;
            const float off = counts ? sum(value, -centres[c]) : 0.0f;
            norm = sum(norm, product(off, off));
        }
        at_address<float>(source.norms)[t] = norm;
        at_address<uint32_t>(source.largest)[t] = largest;
    }
}

// The norm of rank `rank` among tokens that are not exempt; all lanes get it.
CACHEGEN_DEVICE double ranked_norm(const Source& source, uint32_t rank) {
    const uint32_t* const bits = at_address<const uint32_t>(source.norms);
    uint32_t low = 0, high = 0x7f800000u;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        uint32_t below = 0;
        for (uint32_t t = lane_index(); t < source.tokens; t += kLanes)
            below += bits[t] <= middle && !is_exempt(source, t);
        if (warp_sum(below) > rank)
            high = middle;
        else
            low = middle + 1;
    }
    return root(double{as_float(high)});
}

// Marks tokens that are far from the centres. A warp for each group.
CACHEGEN_KERNEL(find_outliers)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch(), lane = lane_index();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    GroupResult& result = result_of(source);
    if (source.deviations || result.done) return;
    uint32_t kept = 0;
    for (uint32_t t = lane; t < source.tokens; t += kLanes) kept += !is_exempt(source, t);
    kept = warp_sum(kept);
    double limit = double_of_bits(0x7ff0000000000000ull);
    if (kept >= kFewTokens) {
        double median = ranked_norm(source, kept / 2);
        if (kept % 2 == 0) median = quotient(sum(ranked_norm(source, kept / 2 - 1), median), 2.0);
        limit = product(3.0, median > 1e-30 ? median : 1e-30);
    }
    const float* const norms = at_address<const float>(source.norms);
    const uint32_t* const largest = at_address<const uint32_t>(source.largest);
    uint32_t fresh = 0, exempt = 0;
    for (uint32_t t = lane; t < source.tokens; t += kLanes) {
        const bool before = is_exempt(source, t);
        const bool is_far = root(double{norms[t]}) > limit || largest[t] > kHugeBits;
        fresh += !before && is_far;
        exempt += before || is_far;
        // Exempt tokens have a norm of 0 and stay what they are.
        if (before || is_far) at_address<uint8_t>(source.marks)[t] = kExempt;
    }
    fresh = warp_sum(fresh);
    exempt = warp_sum(exempt);
    if (lane != 0) return;
    result.exempt = exempt;
    result.done = fresh == 0;
}

// Rounded means, and the energy of what is left. A warp for each group.
CACHEGEN_KERNEL(set_means)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch(), lane = lane_index();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    GroupResult& result = result_of(source);
    float* const means = at_address<float>(source.means);
    if (source.deviations) {
        for (uint32_t c = lane; c < source.channels; c += kLanes) means[c] = 0;
        return;
    }
    const uint32_t kept = source.tokens - result.exempt;
    const auto count = static_cast<double>(kept);
    const float* const centres = at_address<const float>(source.centres);
    const float* const sums = at_address<const float>(source.sums);
    const auto exact_of = [&](uint32_t c) {
        return sum(double{centres[c]}, quotient(double{sums[c]}, count));
    };
    double most = 0;
    for (uint32_t c = lane; c < source.channels; c += kLanes) {
        const double exact = exact_of(c), size = exact < 0 ? -exact : exact;
        most = size > most ? size : most;
    }
    for (unsigned half = 16; half; half /= 2) {
        const double other = shuffle_double(most, lane ^ half);
        most = other > most ? other : most;
    }
    const float scale = kept >= kFewTokens ? static_cast<float>(quotient(most, 127.0)) : 0.0f;
    const uint32_t places = (source.tokens + kLanes - 1) / kLanes;
    double energy = 0;
    for (uint32_t place = 0; place < places; ++place) {
        const uint32_t token = lane * places + place;
        const bool counts = token < source.tokens && !is_exempt(source, token);
        const float norm = counts ? at_address<const float>(source.norms)[token] : 0.0f;
        for (unsigned e = 0; e < kLanes; ++e) {
            const uint32_t bits = shuffle(as_bits(norm), 31 - e);
            energy = sum(energy, double{as_float(bits)});
        }
    }
    for (uint32_t first = 0; first < source.channels; first += kLanes) {
        const uint32_t c = first + lane;
        double less = 0;
        if (c < source.channels) {
            double level = 0;
            if (scale > 0) {
                level = nearest_integer(quotient(exact_of(c), double{scale}));
                level = level < -127 ? -127 : level > 127 ? 127 : level;
            }
            const float mean = product(static_cast<float>(level), scale);
            at_address<int8_t>(source.levels)[c] = static_cast<int8_t>(level);
            means[c] = mean;
            const double moved = sum(double{mean}, -double{centres[c]});
            less = sum(product(product(2.0, moved), double{sums[c]}), -product(product(count, moved), moved));
        }
        for (unsigned other = 0; other < kLanes; ++other) {
            const double of_other = shuffle_double(less, other);
            if (first + other < source.channels) energy = sum(energy, -of_other);
        }
    }
    if (lane != 0) return;
    result.mean_scale = scale;
    result.energy = kept && energy > 0 ? energy : 0.0;
}

// ---- With a profile: of components ---------------------------------------------------------------

// Floats in the order of signed integers, see key_of in ladder_encode_rows.h.
CACHEGEN_DEVICE int32_t key_of(float value) {
    const auto bits = static_cast<int32_t>(as_bits(value));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
CACHEGEN_DEVICE float value_of_key(int32_t key) {
    return as_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// With a profile: the median of every component, a lane each: binary search in the order of the floats' bits.
CACHEGEN_KERNEL(column_medians)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    if (channel >= source.channels || !source.deviations) return;
    const float* const column = values_at(source, 0, channel);
    const uint32_t rank = (source.tokens - 1) / 2;
    int32_t low = static_cast<int32_t>(0x80000000u), high = 0x7fffffff;
    while (low < high) {
        const int32_t middle = (low & high) + ((low ^ high) >> 1);
        uint32_t below = 0;
        for (uint32_t t = 0; t < source.tokens; ++t)
            below += key_of(column[static_cast<uint64_t>(t) * source.stride]) <= middle;
        if (below > rank)
            high = middle;
        else
            low = middle + 1;
    }
    float median = value_of_key(high);
    if (source.tokens % 2 == 0) {
        uint32_t below = 0;
        int32_t next = 0x7fffffff;
        for (uint32_t t = 0; t < source.tokens; ++t) {
            const int32_t key = key_of(column[static_cast<uint64_t>(t) * source.stride]);
            below += key <= high;
            if (key > high && key < next) next = key;
        }
        const float following = below > rank + 1 ? median : value_of_key(next);
        median = quotient(sum(median, following), 2.0f);
    }
    at_address<float>(source.centres)[channel] = median;
}

// With a profile: of every token the distance from the medians, a warp each; `extra` warps a group.
CACHEGEN_KERNEL(row_norms)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count * launch.extra) return;
    const Source& source = source_of(launch, launch.first + warp / launch.extra);
    if (!source.deviations) return;
    const float* const medians = at_address<const float>(source.centres);
    for (uint32_t t = warp % launch.extra; t < source.tokens; t += launch.extra) {
        double total = 0;
        for (uint32_t c = lane_index(); c < source.channels; c += kLanes) {
            const double off = sum(*values_at(source, t, c), -medians[c]);
            total = sum(total, product(off, off));
        }
        total = warp_sum(total);
        if (lane_index() == 0) at_address<double>(source.norms)[t] = root(total);
    }
}

// The number of rank `rank` of not negative doubles; all lanes get it.
CACHEGEN_DEVICE double ranked(const double* values, uint32_t count, uint32_t rank) {
    uint64_t low = 0, high = 0x7ff0000000000000ull;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        uint32_t below = 0;
        for (uint32_t t = lane_index(); t < count; t += kLanes)
            below += bits_of_double(values[t]) <= middle;
        if (warp_sum(below) > rank)
            high = middle;
        else
            low = middle + 1;
    }
    return double_of_bits(high);
}

// Marks tokens that are far from the medians: they do not set the step. A warp for each group.
CACHEGEN_KERNEL(find_odd)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    if (!source.deviations) return;
    const double* const norms = at_address<const double>(source.norms);
    double limit = 0;
    const bool any = source.tokens >= kFewTokens;
    if (any) {
        double median = ranked(norms, source.tokens, (source.tokens - 1) / 2);
        if (source.tokens % 2 == 0)
            median = quotient(sum(median, ranked(norms, source.tokens, source.tokens / 2)), 2.0);
        limit = product(3.0, median > 1e-30 ? median : 1e-30);
    }
    for (uint32_t t = lane_index(); t < source.tokens; t += kLanes) {
        const uint32_t mark = (any && norms[t] > limit ? kOdd : 0) | (t < source.sinks ? kExempt : 0);
        at_address<uint8_t>(source.marks)[t] = static_cast<uint8_t>(mark);
    }
    if (lane_index() == 0) result_of(source).exempt = source.sinks;
}

}  // namespace cachegen
