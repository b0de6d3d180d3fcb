// progressive's encoder, from coefficients to digits: the classes of channels by the shortest code,
// and what errors the decays within cells leave. Digits are computed anew wherever they are needed:
// that costs less than to store and load them.
#pragma once

#include "step.cuh"

namespace cachegen {

CACHEGEN_DEVICE float chunk_step(const Launch& launch, const Source& source) {
    return at_address<const ChunkState>(launch.active)[source.chunk].step;
}

inline constexpr uint64_t kMostSteps = (uint64_t{1} << 32) / kLanes;

// A coefficient in finest steps; `inverse` is that of the step.
CACHEGEN_DEVICE float scaled_at(const Source& source, uint32_t token, uint32_t channel, float mean,
                                float inverse) {
    return product(sum(*values_at(source, token, channel), -mean), inverse);
}

// A value on its way through the passes, as quantize_rows in csrc/encode_rows.h has it: early if it
// is significant in pass 0, else late. `rest` has the digits of later passes, in base 3.
struct Climber {
    uint32_t index, rest, unit, bin;
    bool negative, significant;

    // step: of pass 0. Sets the index of pass 0.
    CACHEGEN_DEVICE Climber(float value, uint32_t step) {
        const auto wide = static_cast<float>(step);
        const uint32_t half = (step - 1) / 2;
        const float exact = magnitude_of(value), most = product(128.0f, wide);
        const float magnitude = exact < most ? exact : most;
        const auto shifted =
            static_cast<uint32_t>(product(4.0f, sum(magnitude, product(0.4f, wide))));
        const auto rounded =
            static_cast<uint32_t>(product(4.0f, sum(product(magnitude, 1 / 1.2f), 0.5f)));
        const uint32_t early = min_of(shifted, 4 * 128 * step - 1);
        const uint32_t late = min_of(rounded, 4 * (half + 1) - 1);
        index = (early >> 2) / step;
        significant = index != 0;
        negative = value < 0;
        rest = significant ? (early >> 2) - index * step : (late >> 2) + half;
        unit = step;
        bin = significant ? 4 * (half + 1) + 4 * rest + (early & 3) : late;
    }

    CACHEGEN_DEVICE uint32_t coarse_symbol() const { return 2 * index - (negative && significant); }

    // Returns the digit of the next pass; `significant` was its context before the call.
    CACHEGEN_DEVICE uint32_t next() {
        unit /= 3;
        const uint32_t digit = rest / unit;
        rest -= digit * unit;
        const bool was = significant;
        significant = was || digit != 1;
        return !was && negative && digit == 2 ? 0 : digit;
    }
};

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

// The length of a channel's code, in 1/1024 bit: whole numbers, so that any order will do.
CACHEGEN_DEVICE uint32_t code_length(const uint32_t* costs, const uint32_t* counts, uint32_t size,
                                     uint32_t one_class) {
    uint32_t length = 0;
    for (uint32_t at = 0; at < size; ++at)
        length += costs[at * kAllClasses + one_class] * counts[at * kLanes];
    return length;
}

// Counts the digits of 32 channels, a lane each, then finds their classes together; with a profile
// the lengths under every shift of its classes. launch.coarse: costs, [counter][family * 64 + class].
CACHEGEN_KERNEL(fit_classes)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    uint32_t* const counts = reinterpret_cast<uint32_t*>(block_shared()) +
                             thread_index() / kLanes * kCounters * kLanes;
    const unsigned lane = lane_index();
    const uint32_t channel = tile.first + lane;
    const uint32_t size = kCoarseCounters + kRefineCounters * (source.passes - 1);
    for (unsigned i = 0; i < size; ++i) counts[i * kLanes + lane] = 0;
    const float step = chunk_step(launch, source), inverse = quotient(1.0f, step);
    const uint32_t coarse = power_of_three(source.passes - 1);
    uint32_t largest = 0, nonzero = 0;
    if (channel < source.channels) {
        const float mean = at_address<const float>(source.means)[channel];
        for (uint32_t t = 0; t < source.tokens; ++t) {
            const float value =
                is_exempt(source, t) ? 0.0f : scaled_at(source, t, channel, mean, inverse);
            const uint32_t magnitude = as_bits(magnitude_of(value));
            largest = magnitude > largest ? magnitude : largest;
            Climber climber(value, coarse);
            ++counts[min_of(climber.index, 16) * kLanes + lane];
            for (uint32_t pass = 1; pass < source.passes; ++pass) {
                const uint32_t first = kCoarseCounters + kRefineCounters * (pass - 1) +
                                       (climber.significant ? 3 : 0);
                ++counts[(first + climber.next()) * kLanes + lane];
            }
        }
        nonzero = source.tokens - counts[lane];
        // Counts have 15 bits: those of longer chunks lose their low bits.
        unsigned shift = 0;
        while (source.tokens >> shift >= 1u << 15) ++shift;
        for (unsigned i = 0; i < size; ++i) counts[i * kLanes + lane] >>= shift;
    }
    largest = warp_max(largest);
    nonzero = warp_sum(nonzero);
    if (lane == 0) {
        atomic_max(&result_of(source).largest, largest);
        atomic_add(&result_of(source).nonzero, nonzero);
    }
    sync_warp();
    const uint32_t* const costs = at_address<const uint32_t>(launch.coarse);
    uint64_t of_offset = 0;
    for (unsigned other = 0; other < min_of(kTile, source.channels - tile.first); ++other) {
        const uint32_t c = tile.first + other;
        if (source.deviations) {
            // Lane n has shift n - 12.
            const uint32_t one = profile_class(launch, source, c, double{step}, int32_t(lane) - 12);
            of_offset += code_length(costs, counts + other, size, one);
            continue;
        }
        uint32_t best = 0xffffffffu, chosen = 0;
        for (uint32_t one = lane; one < kAllClasses; one += kLanes) {
            const uint32_t length = code_length(costs, counts + other, size, one);
            if (length >= best) continue;
            best = length;
            chosen = one;
        }
        for (unsigned half = 16; half; half /= 2) {
            const uint32_t length = shuffle(best, lane ^ half), one = shuffle(chosen, lane ^ half);
            if (length > best || (length == best && one > chosen)) continue;
            best = length;
            chosen = one;
        }
        if (lane == 0) at_address<uint8_t>(source.classes)[c] = static_cast<uint8_t>(chosen);
    }
    if (source.deviations && lane < kOffsets)
        reinterpret_cast<uint64_t*>(partials_of(source, tile))[lane] = of_offset;
}

// With a profile: the shift with the shortest code, then all classes. A warp for each group, which
// also sees whether pass 0 reaches all values and whether its places have 32 bits.
CACHEGEN_KERNEL(choose_offset)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch(), lane = lane_index();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    GroupResult& result = result_of(source);
    const float reach =
        product(sum(127.0f, 0.6f), static_cast<float>(power_of_three(source.passes - 1)));
    const uint64_t steps = uint64_t{(source.tokens + kLanes - 1) / kLanes} * source.channels;
    const bool beyond = as_float(result.largest) > reach || steps >= kMostSteps;
    if (lane == 0 && beyond) give_up(launch, source.error, kBeyondReach);
    if (!source.deviations) return;
    // Lane n sums shift n - 12 over all tiles.
    uint64_t length = 0;
    const uint64_t* const all = at_address<const uint64_t>(source.partials);
    for (uint32_t tile = 0; tile < source.tiles; ++tile) length += all[uint64_t{tile} * kPartials + lane];
    if (lane >= kOffsets) length = ~uint64_t{0};
    uint32_t chosen = lane;
    for (unsigned half = 16; half; half /= 2) {
        const uint64_t other = uint64_t{shuffle(static_cast<uint32_t>(length >> 32), lane ^ half)} << 32 |
                               shuffle(static_cast<uint32_t>(length), lane ^ half);
        const uint32_t one = shuffle(chosen, lane ^ half);
        if (other > length || (other == length && one > chosen)) continue;
        length = other;
        chosen = one;
    }
    const int32_t offset = static_cast<int32_t>(chosen) - 12;
    const double step = chunk_step(launch, source);
    for (uint32_t c = lane; c < source.channels; c += kLanes)
        at_address<uint8_t>(source.classes)[c] =
            static_cast<uint8_t>(profile_class(launch, source, c, step, offset));
    if (lane == 0) result.offset = offset;
}

// Where values lie in their cells, at every kErrorPlaces-th place, by class.
CACHEGEN_KERNEL(count_bins)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    if (channel >= source.channels) return;
    const float inverse = quotient(1.0f, chunk_step(launch, source));
    const float mean = at_address<const float>(source.means)[channel];
    const uint32_t coarse = power_of_three(source.passes - 1);
    const uint32_t scale_class = at_address<const uint8_t>(source.classes)[channel] % kClasses;
    uint32_t* const bins =
        at_address<uint32_t>(source.histogram) + scale_class * histogram_bins(source.passes);
    const uint32_t places = (source.tokens + kLanes - 1) / kLanes;
    uint32_t zeros = 0;  // most values of fine components fall there
    for (uint32_t place = 0; place < places; place += kErrorPlaces) {
        for (uint32_t token = place; token < source.tokens; token += places) {
            if (is_exempt(source, token)) continue;
            const Climber climber(scaled_at(source, token, channel, mean, inverse), coarse);
            if (climber.bin == 2)
                ++zeros;
            else
                atomic_add(bins + climber.bin, 1);
        }
    }
    if (zeros) atomic_add(bins + 2, zeros);
}

// Sums over values of their places in cells, in quarters of the finest one.
struct Moments {
    uint64_t count, sums, squares;

    CACHEGEN_DEVICE void add(uint64_t times, uint64_t place) {
        count += times;
        sums += times * place;
        squares += times * place * place;
    }
    // Squared distances, in finest cells, from a point, as in csrc/fused_fit.cpp.
    CACHEGEN_DEVICE double error(double point) const {
        const auto n = static_cast<double>(count), first = static_cast<double>(sums);
        const double second =
            quotient(sum(sum(static_cast<double>(squares), first), quotient(n, 3.0)), 16.0);
        const double mixed = product(product(2.0, point), quotient(sum(first, quotient(n, 2.0)), 4.0));
        return sum(sum(second, -mixed), product(n, product(point, point)));
    }
};

// The squared errors of a group after every pass, for every decay. A warp for each group, a lane for
// each class. launch.coarse: places in cells as shares of their widths, [decay][pass][late][class].
CACHEGEN_KERNEL(measure_errors)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch(), lane = lane_index();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    GroupResult& result = result_of(source);
    const uint32_t places = (source.tokens + kLanes - 1) / kLanes, total = histogram_bins(source.passes);
    const uint32_t late_end = late_bins(source.passes);
    const uint32_t half = (power_of_three(source.passes - 1) - 1) / 2;
    uint32_t measured = 0;
    for (uint32_t place = 0; place < places; place += kErrorPlaces) {
        const uint32_t token = lane * places + place;
        measured += token < source.tokens && !is_exempt(source, token);
    }
    measured = warp_sum(measured);
    if (measured == 0) return;
    const double share_of_all = quotient(static_cast<double>(source.tokens - result.exempt),
                                         static_cast<double>(measured));
    const double* const shares = at_address<const double>(launch.coarse);
    for (uint32_t pass = 0; pass < source.passes; ++pass) {
        const uint32_t step = power_of_three(source.passes - 1 - pass);
        double errors[kDecays] = {};
        for (unsigned first = 0; first < kClasses; first += kLanes) {
            const uint32_t k = first + lane;
            const uint32_t* const bins = at_address<const uint32_t>(source.histogram) + k * total;
            Moments early{}, late{}, zero{};
            uint32_t seen = 0;
            for (uint32_t bin = 0; bin < late_end; ++bin) {
                const uint32_t n = bins[bin], size = bin / 4;
                seen |= n;
                if (2 * size > step)
                    late.add(n, 4 * ((size + half) % step) + bin % 4);
                else if (n)  // of which none is below 2
                    zero.add(n, bin - 2);
            }
            for (uint32_t bin = late_end; bin < total; ++bin) {
                seen |= bins[bin];
                early.add(bins[bin], 4 * ((bin - late_end) / 4 % step) + (bin - late_end) % 4);
            }
            const uint32_t present = ballot(seen != 0);
CACHEGEN_UNROLL
            for (unsigned decay = 0; decay < kDecays; ++decay) {
                const double* const share = shares + (decay * source.passes + pass) * 2 * kClasses + k;
                const auto width = static_cast<double>(step);
                const double outside =
                    sum(late.error(product(share[kClasses], width)), zero.error(0));
                const double error =
                    sum(early.error(product(share[0], width)), product(1.2 * 1.2, outside));
                double total_error = errors[decay];
                for (unsigned other = 0; other < kLanes; ++other) {
                    const double of_class = shuffle_double(error, other);
                    total_error = sum(total_error, present >> other & 1 ? of_class : 0.0);
                }
                errors[decay] = total_error;
            }
        }
        if (lane == 0)
            for (unsigned decay = 0; decay < kDecays; ++decay)
                result.errors[decay][pass] = product(errors[decay], share_of_all);
    }
}

}  // namespace cachegen
