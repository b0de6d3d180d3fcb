// The Karhunen-Loeve transform of progressive's groups, from components back to channels, on the
// matrix units; and what is left to do for values that wait in the workspace without a transform.
#pragma once

#include "sink.cuh"

namespace cachegen {

inline constexpr unsigned kTileTokens = 64, kTileChannels = 128, kTileDepth = 32;
inline constexpr unsigned kRowHalves = kTileDepth + 8;  // padded, so that rows are in other banks
inline constexpr unsigned kRowFloats = kTileChannels + 4;

// One tile of a product: tokens x channels of one plane, whole heads where the plane has RoPE.
struct Tile {
    uint32_t group, plane;
    uint32_t first_channel, width;  // in the group
    uint32_t first_token, zero;
};
static_assert(sizeof(Tile) == 24);

// Two factors of a product, each as halves: rows of the left one, which is two matrices of `rows` x
// `stride` one after the other, times rows of the right one, whose second matrix may be missing.
struct Factors {
    uint64_t left, right, right_low;
    uint32_t rows, stride, first_row;
    uint32_t first_column, end_column;
    uint32_t depth;
};

// What 128 threads carry from global to shared memory for one depth of 32 components: 16 bytes at a
// time, 4 of them a row.
struct TileLoad {
    uint4 high[2], low[2], basis[4], basis_low[4];
};

CACHEGEN_DEVICE uint4 load_part(uint64_t matrix, uint32_t row, uint32_t rows, uint32_t stride,
                                uint32_t column) {
    if (row >= rows || column >= stride) return uint4{0, 0, 0, 0};
    return *at_address<const uint4>(matrix + 2 * (static_cast<uint64_t>(row) * stride + column));
}

CACHEGEN_DEVICE TileLoad load_tile(const Factors& of, uint32_t depth) {
    TileLoad parts;
    const unsigned row = thread_index() / 4;
    const uint32_t column = depth + thread_index() % 4 * 8;
    const uint64_t low = of.left + uint64_t{2} * of.rows * of.stride;
    for (unsigned i = 0; i < 2; ++i) {
        const uint32_t token = of.first_row + row + 32 * i;
        parts.high[i] = load_part(of.left, token, of.rows, of.stride, column);
        parts.low[i] = load_part(low, token, of.rows, of.stride, column);
    }
    for (unsigned i = 0; i < 4; ++i) {
        const uint32_t channel = of.first_column + row + 32 * i;
        parts.basis[i] = load_part(of.right, channel, of.end_column, of.stride, column);
        if (of.right_low)
            parts.basis_low[i] = load_part(of.right_low, channel, of.end_column, of.stride, column);
    }
    return parts;
}

CACHEGEN_DEVICE uint32_t pair_at(const uint16_t* matrix, unsigned row, unsigned column) {
    return *reinterpret_cast<const uint32_t*>(matrix + row * kRowHalves + column);
}

// A tile of the product, 64 x 128, by a block of 2 x 2 warps, each with 32 rows x 64 columns.
CACHEGEN_DEVICE void multiply_tile(const Factors& of, float (&sums)[2][8][4]) {
    uint16_t* const high = reinterpret_cast<uint16_t*>(block_shared());
    uint16_t* const low = high + kTileTokens * kRowHalves;
    uint16_t* const basis = low + kTileTokens * kRowHalves;
    uint16_t* const basis_low = basis + kTileChannels * kRowHalves;
    const bool has_low = of.right_low != 0;
    const unsigned lane = lane_index(), warp = thread_index() / 32;
    const unsigned first_row = warp / 2 * 32, first_column = warp % 2 * 64;
    const unsigned row = thread_index() / 4, part = thread_index() % 4 * 8;

    TileLoad parts = load_tile(of, 0);
    for (uint32_t depth = 0; depth < of.depth; depth += kTileDepth) {
        sync_block();
        for (unsigned i = 0; i < 2; ++i) {
            *reinterpret_cast<uint4*>(high + (row + 32 * i) * kRowHalves + part) = parts.high[i];
            *reinterpret_cast<uint4*>(low + (row + 32 * i) * kRowHalves + part) = parts.low[i];
        }
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned at = (row + 32 * i) * kRowHalves + part;
            *reinterpret_cast<uint4*>(basis + at) = parts.basis[i];
            if (has_low) *reinterpret_cast<uint4*>(basis_low + at) = parts.basis_low[i];
        }
        sync_block();
        if (depth + kTileDepth < of.depth) parts = load_tile(of, depth + kTileDepth);
CACHEGEN_UNROLL
        for (unsigned k = 0; k < kTileDepth; k += 16) {
            const unsigned column = k + lane % 4 * 2;
            uint32_t a[2][2][4];
CACHEGEN_UNROLL
            for (unsigned m = 0; m < 2; ++m) {
                const unsigned r = first_row + m * 16 + lane / 4;
CACHEGEN_UNROLL
                for (unsigned which = 0; which < 2; ++which) {
                    const uint16_t* const from = which ? low : high;
                    a[m][which][0] = pair_at(from, r, column);
                    a[m][which][1] = pair_at(from, r + 8, column);
                    a[m][which][2] = pair_at(from, r, column + 8);
                    a[m][which][3] = pair_at(from, r + 8, column + 8);
                }
            }
CACHEGEN_UNROLL
            for (unsigned n = 0; n < 8; ++n) {
                const unsigned r = first_column + n * 8 + lane / 4;
                const uint32_t b[2] = {pair_at(basis, r, column), pair_at(basis, r, column + 8)};
CACHEGEN_UNROLL
                for (unsigned m = 0; m < 2; ++m) {
                    multiply_halves(sums[m][n], a[m][1], b);
                    multiply_halves(sums[m][n], a[m][0], b);
                }
                if (!has_low) continue;
                const uint32_t rest[2] = {pair_at(basis_low, r, column),
                                          pair_at(basis_low, r, column + 8)};
CACHEGEN_UNROLL
                for (unsigned m = 0; m < 2; ++m) multiply_halves(sums[m][n], a[m][0], rest);
            }
        }
    }
    sync_block();
}

// The finished value of a channel of a head, own and partner being float values before RoPE.
CACHEGEN_DEVICE float finished(const Plane& plane, uint32_t token, float own, float partner,
                               bool turns, uint32_t pair, bool is_second) {
    float value = own;
    if (turns) value = turned(own, partner, angle_of(plane, token, pair), is_second);
    if (plane.divisor != 1) value = quotient(value, plane.divisor);
    return clamped(value, plane.dtype);
}

// Items are Tiles, one block each.
CACHEGEN_KERNEL(transform_back)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Tile& tile = at_address<const Tile>(launch.items)[launch.first + block_index()];
    const Group& group = at_address<const Group>(launch.groups)[tile.group];
    const unsigned lane = lane_index(), warp = thread_index() / 32;
    const unsigned first_row = warp / 2 * 32, first_column = warp % 2 * 64;
    // Components behind the last one that is not zero in this chunk add nothing.
    const Factors factors{group.coefficients, group.basis, group.basis_low, group.tokens, group.stride,
                          tile.first_token, tile.first_channel, tile.first_channel + tile.width,
                          at_address<const uint32_t>(launch.active)[group.active]};
    float sums[2][8][4] = {};
    multiply_tile(factors, sums);

    float* const out = reinterpret_cast<float*>(block_shared());
CACHEGEN_UNROLL
    for (unsigned m = 0; m < 2; ++m)
CACHEGEN_UNROLL
        for (unsigned n = 0; n < 8; ++n)
CACHEGEN_UNROLL
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned r = first_row + m * 16 + lane / 4 + i / 2 * 8;
                const unsigned c = first_column + n * 8 + lane % 4 * 2 + i % 2;
                const float mean = c < tile.width
                                       ? at_address<const float>(group.means)[tile.first_channel + c]
                                       : 0.0f;
                out[r * kRowFloats + c] = sum(product(sums[m][n][i], group.step * group.basis_scale), mean);
            }
    sync_block();

    const Plane& plane = at_address<const Plane>(launch.planes)[tile.plane];
    const uint32_t begin = tile.first_channel - plane.first_channel;
    const unsigned size = size_of(plane.dtype), units = (tile.width + 7) / 8;
    for (unsigned unit = thread_index(); unit < kTileTokens * units; unit += 128) {
        const unsigned r = unit / units, c = unit % units * 8;
        const uint32_t token = tile.first_token + r;
        if (token >= group.tokens) break;
        const unsigned steps = min_of(8, tile.width - c);
        float v[8];
        for (unsigned i = 0; i < steps; ++i) {
            const uint32_t d = (begin + c + i) % plane.dim;
            uint32_t pair = 0, partner = 0;
            bool is_second = false;
            const bool turns = partner_of(plane, d, pair, partner, is_second);
            const float* const row_of = out + r * kRowFloats + c + i;
            v[i] = finished(plane, token, *row_of, turns ? row_of[int(partner) - int(d)] : 0.0f, turns, pair,
                            is_second);
        }
        const bool one_head = steps == 8 && plane.dim % 8 == 0;
        for (unsigned i = 0; i < steps; ++i) {
            const uint32_t inside = begin + c + i;
            const uint64_t at = row_address(plane, token, inside / plane.dim);
            if (!at) continue;
            const uint64_t to = at + inside % plane.dim * size;
            if (i == 0 && one_head && to % 16 == 0) {
                store_eight(to, v, plane.dtype);
                break;
            }
            store_bits(to, bits_of(v[i], plane.dtype), plane.dtype);
        }
    }
}

// Values without a transform that could not be finished where they were decoded. `extra` blocks for
// each group from `first` on.
CACHEGEN_KERNEL(finish_values)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const uint32_t index = at_address<const uint32_t>(launch.items)[block_index() / launch.extra];
    const Group& group = at_address<const Group>(launch.groups)[index];
    const uint64_t count = static_cast<uint64_t>(group.tokens) * group.channels;
    const float* const values = at_address<const float>(group.coefficients);
    for (uint64_t at = block_index() % launch.extra * 128 + thread_index(); at < count;
         at += launch.extra * 128) {
        const uint32_t token = static_cast<uint32_t>(at / group.channels);
        const uint32_t channel = static_cast<uint32_t>(at % group.channels);
        const Plane* plane = at_address<const Plane>(launch.planes) + group.plane;
        while (channel >= plane->first_channel + plane->heads * plane->dim) ++plane;
        const uint32_t inside = channel - plane->first_channel, d = inside % plane->dim;
        uint32_t pair = 0, partner = 0;
        bool is_second = false;
        const bool turns = partner_of(*plane, d, pair, partner, is_second);
        const float* const own = values + static_cast<uint64_t>(token) * group.stride + channel;
        const float value = finished(*plane, token, *own, turns ? own[int(partner) - int(d)] : 0.0f, turns,
                                     pair, is_second);
        const uint64_t row = row_address(*plane, token, inside / plane->dim);
        if (row)
            store_bits(row + d * size_of(plane->dtype), bits_of(value, plane->dtype), plane->dtype);
    }
}

}  // namespace cachegen
