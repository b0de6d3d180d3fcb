// int8 and cachegen: values to symbols and scales, models for the channels, streams.
#pragma once

#include "encode.cuh"
#include "rows.cuh"

namespace cachegen {

CACHEGEN_DEVICE const Symbols& symbols_of(const Launch& launch, uint32_t index) {
    return at_address<const Symbols>(launch.matrices)[index];
}

CACHEGEN_DEVICE uint32_t token_of_row(const Symbols& matrix, uint32_t row) {
    Matrix shape{};
    shape.anchor_tokens = matrix.anchor_tokens;
    shape.is_delta = matrix.is_delta;
    return token_of_row(shape, row);
}

// A warp for each row and scale: the largest magnitude, then symbols. `first` matrix, `extra` warps.
CACHEGEN_KERNEL(quantise_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch(), lane = lane_index();
    if (warp >= launch.count * launch.extra) return;
    const uint32_t index = at_address<const uint32_t>(launch.items)[warp / launch.extra];
    const Symbols& matrix = symbols_of(launch, index);
    const Plane& plane = at_address<const Plane>(launch.planes)[matrix.plane];
    const uint32_t scales = matrix.channels / matrix.scale_width, dtype = plane.dtype;
    const unsigned size = size_of(dtype);
    const uint64_t row_bytes = uint64_t{matrix.channels} * size;
    const auto levels = static_cast<float>(matrix.levels);
    uint32_t wrong = 0;
    for (uint64_t unit = warp % launch.extra; unit < uint64_t{matrix.tokens} * scales; unit += launch.extra) {
        const auto row = static_cast<uint32_t>(unit / scales);
        const uint32_t begin = static_cast<uint32_t>(unit % scales) * matrix.scale_width;
        const uint32_t token = token_of_row(matrix, row);
        const uint64_t anchor = matrix.anchors + token / (matrix.anchor_tokens ? matrix.anchor_tokens : 1) * row_bytes;
        double missing = 0;
        // The value as it is coded, and as bits of the type; 0 where there is none.
        const auto load = [&](uint32_t channel, float& difference) {
            const uint64_t at = row_address(plane, token, channel / plane.dim);
            if (!at) {
                wrong |= kBadSlot;
                return 0u;
            }
            const uint32_t bits = load_element(at + channel % plane.dim * size, dtype);
            if (!matrix.is_delta) return bits;
            const uint32_t base = load_element(anchor + uint64_t{channel} * size, dtype);
            // Clamping would hide infinities; what else is too large shows in the difference.
            if (dtype == kFloat16 && is_too_large(bits, dtype)) wrong |= kBadValue;
            difference = clamped(sum(value_of(bits, dtype), -value_of(base, dtype)), dtype);
            return bits_of(difference, dtype);
        };
        const uint32_t mask = dtype == kFloat32 ? 0x7fffffffu : 0x7fffu;
        uint32_t largest = 0;
        for (uint32_t c = begin + lane; c < begin + matrix.scale_width; c += kLanes) {
            float difference = 0;
            const uint32_t bits = load(c, difference) & mask;
            missing = sum(missing, product(double{difference}, double{difference}));
            largest = bits > largest ? bits : largest;
        }
        largest = warp_max(largest);
        const float maximum = value_of(largest, dtype);
        if (is_too_large(largest, dtype)) wrong |= kBadValue;
        if (lane == 0) store_bits(matrix.scales + unit * size, largest, dtype);
        const float step = quotient(maximum, levels);
        for (uint32_t c = begin + lane; c < begin + matrix.scale_width; c += kLanes) {
            float difference = 0;
            const float value = value_of(load(c, difference), dtype);
            const float scaled = largest ? nearest_integer(quotient(product(value, levels), maximum)) : 0.0f;
            const auto symbol = static_cast<int32_t>(scaled) + static_cast<int32_t>(matrix.levels);
            at_address<uint8_t>(matrix.symbols)[uint64_t{row} * matrix.channels + c] =
                static_cast<uint8_t>(symbol);
            if (matrix.anchor_tokens && !matrix.is_delta)
                store_bits(matrix.anchors + row * row_bytes + uint64_t{c} * size,
                           bits_of(product(scaled, step), dtype), dtype);
        }
        if (!matrix.is_delta) continue;
        missing = warp_sum(missing);
        if (lane == 0) at_address<double>(matrix.missing)[row] = missing;
    }
    if (wrong) give_up(launch, matrix.error, wrong);
}

// Symbols of channels, 32 counters for each of a warp's 32 lanes, in shared memory.
CACHEGEN_DEVICE uint32_t* count_symbols(const Symbols& matrix, const Columns& tile) {
    const unsigned lane = lane_index();
    uint32_t* const counts =
        reinterpret_cast<uint32_t*>(block_shared()) + thread_index() / kLanes * 32 * kLanes;
    for (unsigned i = 0; i < 32; ++i) counts[i * kLanes + lane] = 0;
    const uint32_t channel = tile.first + lane;
    if (channel < matrix.channels) {
        const uint8_t* const column = at_address<const uint8_t>(matrix.symbols) + channel;
        for (uint32_t t = 0; t < matrix.tokens; ++t)
            ++counts[((column[uint64_t{t} * matrix.channels] >> matrix.shift) & 31u) * kLanes + lane];
    }
    sync_warp();
    return counts;
}

// The class and rotation with the shortest code, as fit_parametric in codec/entropy.py.
// launch.coarse: costs of the 112 classes, [symbol][class] doubles.
inline constexpr unsigned kParametric = 112;

CACHEGEN_KERNEL(fit_parametric)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Symbols& matrix = symbols_of(launch, tile.owner);
    const uint32_t* const counts = count_symbols(matrix, tile);
    const double* const costs = at_address<const double>(launch.coarse);
    const unsigned lane = lane_index();
    for (unsigned other = 0; other < min_of(kTile, matrix.channels - tile.first); ++other) {
        uint32_t total = 0;
        uint64_t weighted = 0;
        for (unsigned symbol = 0; symbol < 32; ++symbol) {
            const uint32_t count = counts[symbol * kLanes + other];
            total += count;
            weighted += uint64_t{count} * symbol;
        }
        const double mean = quotient(static_cast<double>(weighted), static_cast<double>(total ? total : 1));
        const auto middle = static_cast<int32_t>(nearest_integer(mean));
        double best = 0;
        uint32_t chosen = 0xffffffffu;
        for (uint32_t way = 0; way < 3; ++way) {
            const int32_t step = way == 0 ? 0 : way == 1 ? -1 : 1;
            const auto rotation = static_cast<uint32_t>(middle + step - 16) & 31u;
            double of_way = 0;
            uint32_t class_of_way = 0xffffffffu;
            for (uint32_t one = lane; one < kParametric; one += kLanes) {
                double bits = 0;
                for (unsigned symbol = 0; symbol < 32; ++symbol)
                    bits = fused(static_cast<double>(counts[((symbol + rotation) & 31u) * kLanes + other]),
                                 costs[symbol * kParametric + one], bits);
                if (class_of_way == 0xffffffffu || bits < of_way) {
                    of_way = bits;
                    class_of_way = one;
                }
            }
            for (unsigned half = 16; half; half /= 2) {
                const double bits = shuffle_double(of_way, lane ^ half);
                const uint32_t one = shuffle(class_of_way, lane ^ half);
                if (bits < of_way || (bits == of_way && one < class_of_way)) {
                    of_way = bits;
                    class_of_way = one;
                }
            }
            if (chosen == 0xffffffffu || of_way < best) {
                best = of_way;
                chosen = class_of_way << 8 | rotation;
            }
        }
        if (lane != 0) continue;
        at_address<uint8_t>(matrix.classes)[tile.first + other] = static_cast<uint8_t>(chosen >> 8);
        at_address<uint8_t>(matrix.rotations)[tile.first + other] = static_cast<uint8_t>(chosen & 31);
    }
}

// Frequencies of a channel that sum to 4096, none that occurs being 0: normalize_counts in
// codec/entropy.py. launch.coarse: log2((n + 1) / n) for n from 0 to 4096 (0 at n = 0), doubles.
CACHEGEN_KERNEL(fit_frequencies)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Symbols& matrix = symbols_of(launch, tile.owner);
    uint32_t* const counts = count_symbols(matrix, tile) + lane_index();
    const uint32_t channel = tile.first + lane_index();
    if (channel >= matrix.channels) return;
    const double* const gains = at_address<const double>(launch.coarse);
    uint16_t* const freqs = at_address<uint16_t>(matrix.freqs) + uint64_t{channel} * matrix.alphabet;
    uint32_t total = 0;
    for (unsigned s = 0; s < matrix.alphabet; ++s) total += counts[s * kLanes];
    if (total == 0) counts[0] = total = 1;
    const double share = quotient(4096.0, static_cast<double>(total));
    int32_t rest = kTotal;
    for (unsigned s = 0; s < matrix.alphabet; ++s) {
        const uint32_t count = counts[s * kLanes];
        const auto whole = static_cast<uint32_t>(product(static_cast<double>(count), share));
        freqs[s] = static_cast<uint16_t>(count ? (whole ? whole : 1) : 0);
        rest -= freqs[s];
    }
    for (; rest != 0; rest += rest > 0 ? -1 : 1) {
        // One unit where it saves (or costs) the fewest bits; the first of equal ones.
        unsigned chosen = 0;
        double best = 0;
        bool any = false;
        for (unsigned s = 0; s < matrix.alphabet; ++s) {
            const auto count = static_cast<double>(counts[s * kLanes]);
            const uint32_t freq = freqs[s];
            if (rest > 0 ? counts[s * kLanes] == 0 : freq <= 1) continue;
            const double bits = product(count, gains[rest > 0 ? (freq ? freq : 1) : freq - 1]);
            if (any && !(rest > 0 ? bits > best : bits < best)) continue;
            any = true;
            best = bits;
            chosen = s;
        }
        freqs[chosen] = static_cast<uint16_t>(freqs[chosen] + (rest > 0 ? 1 : -1));
    }
}

// The symbol as it goes into digits: rotated by its channel's rotation, if it has one.
CACHEGEN_DEVICE uint32_t rotated(const Symbols& matrix, uint32_t symbol, uint32_t channel) {
    if (!matrix.rotations) return symbol;
    const uint32_t rotation = at_address<const uint8_t>(matrix.rotations)[channel];
    return (symbol - (rotation << matrix.shift)) & ((32u << matrix.shift) - 1) & 0xffu;
}

template <unsigned K>
CACHEGEN_DEVICE void encode_matrix(const Launch& launch, const Run& run, const Symbols& matrix) {
    const unsigned lane = lane_index();
    uint32_t* const tile = reinterpret_cast<uint32_t*>(block_shared()) +
                           thread_index() / kLanes * kBlockSteps * kInverseWords<32>;
    const uint32_t above = lanes_above(lane);
    const uint8_t* const classes = at_address<const uint8_t>(matrix.classes);
    const uint32_t* const tables = at_address<const uint32_t>(matrix.inverses);
    Encoder encoder;
    encoder.open(run);
    for (uint32_t end = run.end_step; end > run.begin_step;) {
        const StepBlock block(run.begin_step, end, matrix.channels);
        const bool active = lane < lanes_at(matrix.tokens, matrix.places, block.place);
        const uint64_t row = uint64_t{lane} * matrix.places + block.place;
        const uint8_t* const from =
            at_address<const uint8_t>(matrix.symbols) + row * matrix.channels + block.channel;
        uint32_t symbols[kBlockSteps];
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i)
            symbols[i] = i < block.steps && active ? rotated(matrix, from[i], block.channel + i) : 0;
        sync_warp();
        for (unsigned at = lane; at < block.steps * kInverseWords<K>; at += kLanes) {
            const uint32_t c = block.channel + at / kInverseWords<K>;
            const uint32_t model = classes ? classes[c] : c;
            tile[at] = tables[uint64_t{model} * kInverseWords<K> + at % kInverseWords<K>];
        }
        sync_warp();
CACHEGEN_UNROLL
        for (unsigned i = kBlockSteps; i-- > 0;) {
            if (i >= block.steps) continue;
            for (unsigned bit = 0; bit < matrix.raw; ++bit) {
                const uint32_t plane = ballot(active && (symbols[i] >> bit & 1));
                const uint64_t step = end - block.steps + i - run.begin_step;
                if (lane == 0) at_address<uint32_t>(run.raw)[step * matrix.raw + bit] = plane;
            }
            encoder.put<K>(tile + i * kInverseWords<K>, symbols[i] >> matrix.shift, active, above);
        }
        end -= block.steps;
    }
    encoder.close(run, lane);
    if (encoder.wrong) give_up(launch, matrix.error, encoder.wrong);
}

CACHEGEN_KERNEL(encode_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned index = warp_of_launch();
    if (index >= launch.count) return;
    const Run& run = at_address<const Run>(launch.streams)[index];
    const Symbols& matrix = symbols_of(launch, run.owner);
    if (matrix.buckets == 16)
        encode_matrix<16>(launch, run, matrix);
    else
        encode_matrix<32>(launch, run, matrix);
}

}  // namespace cachegen
