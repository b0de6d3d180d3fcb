// progressive's encoder, from coefficients to digits: the classes of channels by the shortest code,
// and the decay within cells by the smallest error. Digits are computed anew wherever they are
// needed: that costs less than to store and load them.
#pragma once

#include "statistics.cuh"

namespace cachegen {

// One value on its way through the passes; the float operations are those of codec/ladder.py.
struct Climber {
    float magnitude, low, width, step;
    bool negative, significant;

    // Returns the index of pass 0.
    CACHEGEN_DEVICE uint32_t start(float value, float coarse_step) {
        magnitude = magnitude_of(value);
        negative = value < 0;
        step = coarse_step;
        const float place = sum(quotient(magnitude, step), 0.4f);
        const auto index = static_cast<uint32_t>(place < 127.5f ? place : 127.5f);
        significant = index > 0;
        low = product(sum(static_cast<float>(index), -0.4f), step);
        width = step;
        return index;
    }

    // Returns the digit of the next pass; `significant` was its context before the call.
    CACHEGEN_DEVICE uint32_t next() {
        step = quotient(step, 3.0f);
        const float edge = product(0.6f, step), third_width = quotient(width, 3.0f);
        const float inside = quotient(sum(magnitude, -low), third_width);
        const uint32_t third = (inside >= 1.0f) + (inside >= 2.0f);
        const bool was = significant, fresh = !was && magnitude >= edge;
        low = was ? sum(low, product(static_cast<float>(third), third_width)) : edge;
        width = was ? third_width : product(1.2f, step);
        significant = was || fresh;
        return was ? third : fresh ? (negative ? 0 : 2) : 1;
    }
};

CACHEGEN_DEVICE float coarse_step_of(const Source& source) {
    float step = 1;
    for (uint32_t i = 1; i < source.passes; ++i) step *= 3;
    return step;
}

CACHEGEN_DEVICE float chunk_step(const Launch& launch, const Source& source) {
    return at_address<const ChunkState>(launch.active)[source.chunk].step;
}

// The class of a profile's component: how many of the numbers between classes are not above its
// deviation in steps; then shifted.
CACHEGEN_DEVICE uint32_t profile_class(const Launch& launch, const Source& source, uint32_t channel,
                                       double step, int32_t offset) {
    const double deviation =
        quotient(double{at_address<const float>(source.deviations)[channel]}, step);
    const float* const edges = at_address<const float>(launch.refine);
    int32_t n = 0;
    for (unsigned k = 0; k < kClasses - 1; ++k) n += double{edges[k]} <= deviation;
    n += offset;
    n = n < 0 ? 0 : n > int32_t{kClasses} - 1 ? int32_t{kClasses} - 1 : n;
    return at_address<const uint8_t>(source.families)[channel] * kClasses +
           static_cast<uint32_t>(n);
}

// Bits of a channel under a class: a pass after the other, as the CPU sums.
CACHEGEN_DEVICE double code_length(const double* costs, const uint32_t* counts, uint32_t passes,
                                   uint32_t one_class) {
    double bits = 0;
    for (uint32_t pass = 0, at = 0; pass < passes; ++pass) {
        const uint32_t end = at + (pass ? 6 : 17);
        double of_pass = 0;
        for (; at < end; ++at)
            of_pass = fused(costs[at * kAllClasses + one_class],
                            static_cast<double>(counts[at * kLanes]), of_pass);
        bits = sum(bits, of_pass);
    }
    return bits;
}

// Counts the digits of 32 channels, a lane each, then finds their classes together; with a profile
// the bits of every shift of its classes. launch.coarse: costs, [counter][family * 64 + class].
CACHEGEN_KERNEL(fit_classes)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    uint32_t* const counts = reinterpret_cast<uint32_t*>(block_shared()) +
                             thread_index() / kLanes * kCounters * kLanes;
    const unsigned lane = lane_index();
    const uint32_t channel = tile.first + lane;
    for (unsigned i = 0; i < kCounters; ++i) counts[i * kLanes + lane] = 0;
    const float step = chunk_step(launch, source), coarse = coarse_step_of(source);
    if (channel < source.channels) {
        for (uint32_t t = 0; t < source.tokens; ++t) {
            Climber climber;
            const uint32_t index = climber.start(quotient(*values_at(source, t, channel), step), coarse);
            ++counts[min_of(index, 16) * kLanes + lane];
            for (uint32_t pass = 1; pass < source.passes; ++pass) {
                const uint32_t first = 17 + 6 * (pass - 1) + (climber.significant ? 3 : 0);
                ++counts[(first + climber.next()) * kLanes + lane];
            }
        }
    }
    sync_warp();
    const double* const costs = at_address<const double>(launch.coarse);
    double* const partials = partials_of(source, tile);
    double of_offset = 0;
    for (unsigned other = 0; other < min_of(kTile, source.channels - tile.first); ++other) {
        const uint32_t c = tile.first + other;
        if (source.deviations) {
            // Lane n has shift n - 12.
            const uint32_t one = profile_class(launch, source, c, double{step}, int32_t(lane) - 12);
            of_offset = sum(of_offset, code_length(costs, counts + other, source.passes, one));
            continue;
        }
        double best = 0;
        uint32_t chosen = kAllClasses;
        for (uint32_t one = lane; one < kAllClasses; one += kLanes) {
            const double bits = code_length(costs, counts + other, source.passes, one);
            if (chosen == kAllClasses || bits < best) {
                best = bits;
                chosen = one;
            }
        }
        for (unsigned half = 16; half; half /= 2) {
            const double bits = shuffle_double(best, lane ^ half);
            const uint32_t one = shuffle(chosen, lane ^ half);
            if (bits < best || (bits == best && one < chosen)) {
                best = bits;
                chosen = one;
            }
        }
        if (lane == 0) at_address<uint8_t>(source.classes)[c] = static_cast<uint8_t>(chosen);
    }
    if (source.deviations && lane < kOffsets) partials[lane] = of_offset;
}

// With a profile: the shift with the shortest code, then all classes. A warp for each group.
CACHEGEN_KERNEL(choose_offset)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    if (!source.deviations) return;
    double best = 0;
    int32_t chosen = -12;
    for (unsigned n = 0; n < kOffsets; ++n) {
        const double bits = sum_partials(source, n);
        if (n && !(bits < best)) continue;
        best = bits;
        chosen = static_cast<int32_t>(n) - 12;
    }
    const double step = chunk_step(launch, source);
    for (uint32_t c = lane_index(); c < source.channels; c += kLanes)
        at_address<uint8_t>(source.classes)[c] =
            static_cast<uint8_t>(profile_class(launch, source, c, step, chosen));
    if (lane_index() == 0) result_of(source).offset = chosen;
}

CACHEGEN_DEVICE uint32_t power_of_three(uint32_t n) {
    uint32_t power = 1;
    for (uint32_t i = 0; i < n; ++i) power *= 3;
    return power;
}

// Adds the squared errors of a value after every pass. offsets: of its way, [pass][late][class].
CACHEGEN_DEVICE void add_errors(const Source& source, float value, float coarse,
                                const float* offsets, uint32_t scale_class, double* errors) {
    Climber climber;
    auto v = static_cast<int32_t>(climber.start(value, coarse));
    if (climber.negative) v = -v;
CACHEGEN_UNROLL
    for (uint32_t pass = 0; pass < kMaxPasses; ++pass) {
        if (pass >= source.passes) break;
        const auto limit = static_cast<int32_t>(power_of_three(pass));
        if (pass) {
            const auto digit = static_cast<int32_t>(climber.next());
            const int32_t twice = digit << ((v < 0 ? -v : v) < limit / 3);
            v = 3 * v + (v ? (v < 0 ? -twice : twice) : digit - 1);
        }
        const int32_t size = v < 0 ? -v : v;
        const float* const of_pass = offsets + pass * 2 * kClasses;
        const float m = static_cast<float>(size);
        const float cell = size < limit ? sum(product(m, 0.6f), of_pass[kClasses + scale_class])
                                        : sum(m, of_pass[scale_class]);
        const auto step = static_cast<float>(power_of_three(source.passes - 1 - pass));
        const float x = product(v == 0 ? 0.0f : cell, step);
        const double difference = sum(v < 0 ? -x : x, -value);
        errors[pass] = sum(errors[pass], product(difference, difference));
    }
}

// Squared errors of a tile's values after every pass, by way of reconstruction: of every `extra`th
// token for all decays, or with extra 1 of all tokens for the one that was chosen.
// launch.coarse: offsets, [way][pass][late][class].
CACHEGEN_KERNEL(sum_errors)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    const bool exists = channel < source.channels, chosen = launch.extra == 1;
    const float step = chunk_step(launch, source), coarse = coarse_step_of(source);
    const uint32_t per_way = source.passes * 2 * kClasses;
    const uint32_t scale_class =
        exists ? at_address<const uint8_t>(source.classes)[channel] % kClasses : 0;
    for (unsigned way = 0; way < (chosen ? 1u : kDecays); ++way) {
        const float* const offsets = at_address<const float>(launch.coarse) +
                                     (chosen ? result_of(source).decay : way) * per_way;
        double errors[kMaxPasses] = {};
        if (exists)
            for (uint32_t t = 0; t < source.tokens; t += launch.extra)
                add_errors(source, quotient(*values_at(source, t, channel), step), coarse, offsets,
                           scale_class, errors);
CACHEGEN_UNROLL
        for (uint32_t pass = 0; pass < kMaxPasses; ++pass) {
            if (pass >= source.passes) break;
            const double total = warp_sum(errors[pass]);
            if (lane_index() == 0) partials_of(source, tile)[way * source.passes + pass] = total;
        }
    }
}

// The decay with the smallest errors, those of all passes counting the same; or, with extra 1, the
// errors of a group after each pass. A warp for each group.
CACHEGEN_KERNEL(choose_decay)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    GroupResult& result = result_of(source);
    double best = 0;
    uint32_t chosen = 0;
    for (unsigned way = 0; way < (launch.extra == 1 ? 1u : kDecays); ++way) {
        double logs = 0;
        for (uint32_t pass = 0; pass < source.passes; ++pass) {
            const double error = sum_partials(source, way * source.passes + pass);
            if (launch.extra == 1 && lane_index() == 0) result.errors[pass] = error;
            logs = sum(logs, logarithm(error > 1e-30 ? error : 1e-30));
        }
        if (way && !(logs < best)) continue;
        best = logs;
        chosen = way;
    }
    if (launch.extra != 1 && lane_index() == 0) result.decay = chosen;
}

}  // namespace cachegen
