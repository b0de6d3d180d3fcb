// progressive's encoder, from values to coefficients and the step: rows of a group as floats, tokens
// that are stored exactly, means, spread. Every sum has one order, so that a chunk has one object.
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
    if (wrong) give_up(launch, source.error, wrong);
    if (source.centre) atomic_max(&result_of(source).widest, as_bits(widest));
}

// Floats in the order of signed integers, see key_of in ladder_encode_rows.h.
CACHEGEN_DEVICE int32_t key_of(float value) {
    const auto bits = static_cast<int32_t>(as_bits(value));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
CACHEGEN_DEVICE float value_of_key(int32_t key) {
    return as_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// The median of every channel, a lane each: binary search in the order of the floats' bits.
CACHEGEN_KERNEL(column_medians)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    if (channel >= source.channels) return;
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
    at_address<float>(source.medians)[channel] = median;
}

// Of every token the distance from the medians, a warp each: `extra` warps for each group.
CACHEGEN_KERNEL(row_norms)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count * launch.extra) return;
    const Source& source = source_of(launch, launch.first + warp / launch.extra);
    const float* const medians = at_address<const float>(source.medians);
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

// Marks tokens that are far from the medians, and those to be stored exactly. A warp each group.
CACHEGEN_KERNEL(find_outliers)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const Source& source = source_of(launch, launch.first + warp);
    const double* const norms = at_address<const double>(source.norms);
    double limit = 0;
    const bool any = source.tokens >= 8;
    if (any) {
        double median = ranked(norms, source.tokens, (source.tokens - 1) / 2);
        if (source.tokens % 2 == 0)
            median = quotient(sum(median, ranked(norms, source.tokens, source.tokens / 2)), 2.0);
        limit = product(3.0, median > 1e-30 ? median : 1e-30);
    }
    uint32_t exempt = 0;
    for (uint32_t t = lane_index(); t < source.tokens; t += kLanes) {
        uint32_t mark = any && norms[t] > limit ? kOdd : 0;
        // Classes of a profile are not spoilt by odd tokens, see codec/progressive.py.
        if (t < source.sinks || (mark && !source.deviations)) mark |= kExempt;
        at_address<uint8_t>(source.marks)[t] = static_cast<uint8_t>(mark);
        exempt += mark & kExempt;
    }
    exempt = warp_sum(exempt);
    if (lane_index() == 0) result_of(source).exempt = exempt;
}

// Means of the channels over tokens that are not exempt, in order of tokens. A lane each.
CACHEGEN_KERNEL(column_means)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    const uint32_t channel = tile.first + lane_index();
    if (channel >= source.channels || source.deviations) return;
    const uint8_t* const marks = at_address<const uint8_t>(source.marks);
    double total = 0;
    for (uint32_t t = 0; t < source.tokens; ++t)
        if (!(marks[t] & kExempt)) total = sum(total, double{*values_at(source, t, channel)});
    const double mean = quotient(total, static_cast<double>(source.tokens - result_of(source).exempt));
    at_address<double>(source.means)[channel] = mean;
    atomic_max(&result_of(source).largest_mean, bits_of_double(mean) & ~(uint64_t{1} << 63));
}

// Subtracts the rounded mean, empties exempt rows, and sums squares: of all tokens, of odd ones.
CACHEGEN_KERNEL(centre_columns)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    GroupResult& result = result_of(source);
    const uint32_t channel = tile.first + lane_index();
    const bool exists = channel < source.channels;
    float mean = 0, scale = 0;
    // Fewer than eight tokens cannot pay for a mean.
    if (!source.deviations && source.tokens - result.exempt >= 8)
        scale = static_cast<float>(quotient(double_of_bits(result.largest_mean), 127.0));
    if (scale != 0 && exists) {
        const double exact = at_address<const double>(source.means)[channel];
        double level = nearest_integer(quotient(exact, double{scale}));
        level = level < -127 ? -127 : level > 127 ? 127 : level;
        at_address<int8_t>(source.levels)[channel] = static_cast<int8_t>(level);
        mean = product(static_cast<float>(level), scale);
    }
    if (tile.first == 0 && lane_index() == 0) result.mean_scale = scale;
    const uint8_t* const marks = at_address<const uint8_t>(source.marks);
    double total = 0, odd = 0;
    float largest = 0;
    if (exists) {
        for (uint32_t t = 0; t < source.tokens; ++t) {
            float* const at = values_at(source, t, channel);
            const float value = marks[t] & kExempt ? 0.0f : sum(*at, -mean);
            *at = value;
            const double square = product(double{value}, double{value});
            total = sum(total, square);
            if (marks[t] & kOdd) odd = sum(odd, square);
            largest = magnitude_of(value) > largest ? magnitude_of(value) : largest;
        }
    }
    total = warp_sum(total);
    odd = warp_sum(odd);
    const uint32_t widest = warp_max(as_bits(largest));
    if (lane_index() != 0) return;
    partials_of(source, tile)[0] = total;
    partials_of(source, tile)[1] = odd;
    atomic_max(&result.largest, widest);
}

// Sums one of the partials of a group's tiles; all lanes of the warp get it.
CACHEGEN_DEVICE double sum_partials(const Source& source, unsigned which) {
    double total = 0;
    const double* const all = at_address<const double>(source.partials) + which;
    for (uint32_t tile = lane_index(); tile < source.tiles; tile += kLanes)
        total = sum(total, all[uint64_t{tile} * kPartials]);
    return warp_sum(total);
}

// The step of every chunk, relative to the spread of its coefficients. A warp each; launch.items:
// what the host says of the chunks.
CACHEGEN_KERNEL(choose_step)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const ChunkState& chunk = at_address<const ChunkState>(launch.items)[warp];
    double energy = 0;
    uint32_t largest = 0;
    for (uint32_t g = 0; g < chunk.groups; ++g) {
        const Source& source = source_of(launch, chunk.first_group + g);
        const double of_group = sum(sum_partials(source, 0), -sum_partials(source, 1));
        energy = sum(energy, of_group > 0 ? of_group : 0.0);
        const uint32_t magnitude = result_of(source).largest;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (lane_index() != 0) return;
    const double spread = root(quotient(energy, chunk.values));
    const float step = spread > 0 ? static_cast<float>(product(chunk.relative, spread)) : 1.0f;
    ChunkState& out = at_address<ChunkState>(launch.active)[warp];
    out.spread = spread;
    out.step = step;
    const auto reach = static_cast<float>(product(chunk.reach, double{step}));
    if (as_float(largest) > reach) give_up(launch, chunk.error, kBeyondReach);
}

}  // namespace cachegen
