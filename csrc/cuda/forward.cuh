// The Karhunen-Loeve transform of progressive's encoder, from channels to components: as klt.cuh, the
// product of halves and of what rounding to halves lost.
#pragma once

#include "klt.cuh"
#include "statistics.cuh"

namespace cachegen {

// A power of two by which the rows of a group are divided, so that halves hold them.
CACHEGEN_DEVICE float scale_of_rows(const Source& source) {
    const uint32_t exponent = result_of(source).widest >> 23;
    // The widest value lies in [512, 1024) then.
    return exponent > 9 + 1 ? as_float((exponent - 9) << 23) : 1.0f;
}

// Rows less the centre as two matrices of halves. `extra` blocks for each group.
CACHEGEN_KERNEL(split_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Source& source = source_of(launch, launch.first + block_index() / launch.extra);
    const float scale = scale_of_rows(source);
    const uint64_t units = uint64_t{source.tokens} * source.stride / 8;
    for (uint64_t unit = block_index() % launch.extra * 128 + thread_index(); unit < units;
         unit += launch.extra * 128) {
        const auto token = static_cast<uint32_t>(unit * 8 / source.stride);
        const auto channel = static_cast<uint32_t>(unit * 8 % source.stride);
        float rounded[8], lost[8];
        for (unsigned i = 0; i < 8; ++i) {
            rounded[i] = 0;
            if (channel + i < source.channels) {
                const float centre = at_address<const float>(source.centre)[channel + i];
                rounded[i] = quotient(sum(*values_at(source, token, channel + i), -centre), scale);
            }
            lost[i] = rounded[i] - float16_value(float16_pair(rounded[i], 0.0f) & 0xffff);
        }
        const uint64_t high = source.halves + 16 * unit;
        store_eight(high, rounded, kFloat16);
        store_eight(high + uint64_t{2} * source.tokens * source.stride, lost, kFloat16);
    }
}

// Items are Tiles of tokens x components, one block each.
CACHEGEN_KERNEL(transform_forward)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Tile& tile = at_address<const Tile>(launch.items)[block_index()];
    const Source& source = source_of(launch, tile.group);
    const Factors factors{source.halves, source.forward, source.forward_low, source.tokens,
                          source.stride, tile.first_token, tile.first_channel, source.components,
                          source.channels};
    float sums[2][8][4] = {};
    multiply_tile(factors, sums);
    const unsigned lane = lane_index(), warp = thread_index() / 32;
    const float scale = scale_of_rows(source) * source.forward_scale;
CACHEGEN_UNROLL
    for (unsigned m = 0; m < 2; ++m)
CACHEGEN_UNROLL
        for (unsigned n = 0; n < 8; ++n)
CACHEGEN_UNROLL
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned token = tile.first_token + warp / 2 * 32 + m * 16 + lane / 4 + i / 2 * 8;
                const unsigned c = warp % 2 * 64 + n * 8 + lane % 4 * 2 + i % 2;
                if (token < source.tokens && c < tile.width)
                    *values_at(source, token, tile.first_channel + c) = product(sums[m][n][i], scale);
            }
}

}  // namespace cachegen
