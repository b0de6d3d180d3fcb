// int8 and cachegen: symbols of a matrix, times the scale of their row, to the cache; one warp for
// each stream. With anchors the first pass writes decoded anchors to the workspace and the second
// one adds them.
#pragma once

#include "rans.cuh"
#include "sink.cuh"

namespace cachegen {

// Which token of the plane a row of the matrix is.
CACHEGEN_DEVICE uint32_t token_of_row(const Matrix& matrix, uint32_t row) {
    if (!matrix.anchor_tokens) return row;
    if (!matrix.is_delta) return row * matrix.anchor_tokens;
    const uint32_t rest = matrix.anchor_tokens - 1;
    return row / rest * matrix.anchor_tokens + 1 + row % rest;
}

// The tables of the models of up to eight channels, to shared memory.
CACHEGEN_DEVICE void load_tables(const Matrix& matrix, uint32_t channel, unsigned steps,
                                 unsigned lane, Bucket* tile) {
    const uint8_t* const classes = at_address<const uint8_t>(matrix.classes);
    const Bucket* const tables = at_address<const Bucket>(matrix.tables);
    const unsigned total = steps * matrix.buckets;
    for (unsigned at = lane; at < total; at += kLanes) {
        const uint32_t c = channel + at / matrix.buckets;
        const uint32_t model = classes ? classes[c] : c;
        tile[at] = tables[model * matrix.buckets + at % matrix.buckets];
    }
}

template <unsigned K>
CACHEGEN_DEVICE void decode_steps(Decoder& decoder, const Bucket* tile, unsigned steps, bool active,
                                  uint32_t below, unsigned (&symbols)[kBlockSteps]) {
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        if (i < steps) {
            uint32_t state = decoder.state;
            symbols[i] = take<K>(state, tile + i * K);
            if (active) decoder.state = state;
            decoder.refill(active, below);
        }
    }
}

CACHEGEN_DEVICE void store_value(const Matrix& matrix, const Plane& plane, uint32_t row,
                                 uint32_t token, uint32_t channel, float value) {
    const uint32_t head = channel / plane.dim, d = channel % plane.dim;
    const unsigned size = size_of(plane.dtype);
    const uint64_t offset = static_cast<uint64_t>(channel) * size;
    const uint64_t row_bytes = static_cast<uint64_t>(matrix.channels) * size;
    uint32_t bits = bits_of(value, plane.dtype);
    if (matrix.is_delta) {
        const uint64_t anchor = matrix.anchors + token / matrix.anchor_tokens * row_bytes + offset;
        const float base = value_of(load_bits(anchor, plane.dtype), plane.dtype);
        bits = bits_of(sum(base, value_of(bits, plane.dtype)), plane.dtype);
    } else if (matrix.anchor_tokens) {
        store_bits(matrix.anchors + row * row_bytes + offset, bits, plane.dtype);
    }
    const uint32_t copies = matrix.spreads ? matrix.anchor_tokens : 1;
    for (uint32_t copy = 0; copy < copies && token + copy < plane.tokens; ++copy) {
        const uint64_t address = row_address(plane, token + copy, head);
        if (address) store_bits(address + d * size, bits, plane.dtype);
    }
}

CACHEGEN_KERNEL(decode_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = thread_index() / kLanes, lane = lane_index();
    const uint32_t index = block_index() * 4 + warp;
    if (index >= launch.count) return;
    const Stream& stream = at_address<const Stream>(launch.streams)[launch.first + index];
    const Matrix& matrix = at_address<const Matrix>(launch.matrices)[stream.owner];
    const Plane& plane = at_address<const Plane>(launch.planes)[matrix.plane];
    Bucket* const tile = reinterpret_cast<Bucket*>(block_shared()) + warp * kBlockSteps * 32;
    const uint32_t below = (1u << lane) - 1;
    const uint8_t* const rotations = at_address<const uint8_t>(matrix.rotations);
    const uint64_t count = static_cast<uint64_t>(matrix.tokens) * matrix.channels;
    const uint32_t shift = matrix.shift, largest = 2 * matrix.levels;
    const bool is_rans = matrix.kind == kRans;
    const bool whole = !matrix.anchor_tokens && plane.dim % 8 == 0 && plane.base % 16 == 0 &&
                       plane.head_stride % 8 == 0;

    Decoder decoder{kStateMin, nullptr, 0, 0, 0};
    if (is_rans) decoder.open(stream, lane);
    const uint32_t* raw = reinterpret_cast<const uint32_t*>(at_address<const uint8_t>(stream.base) + stream.raw);

    for (uint32_t step = stream.begin_step; step < stream.end_step;) {
        const uint32_t place = step / matrix.channels, c = step % matrix.channels;
        const uint32_t left = min_of(stream.end_step - step, matrix.channels - c);
        const unsigned steps = min_of(left, kBlockSteps - c % kBlockSteps);
        const unsigned lanes = lanes_at(matrix.tokens, matrix.places, place);
        const bool active = lane < lanes;
        const uint32_t row = lane * matrix.places + place;
        unsigned symbols[kBlockSteps] = {};
        if (is_rans) {
            decoder.look_ahead(lane);
            sync_warp();
            load_tables(matrix, c, steps, lane, tile);
            sync_warp();
            if (matrix.buckets == 16)
                decode_steps<16>(decoder, tile, steps, active, below, symbols);
            else
                decode_steps<32>(decoder, tile, steps, active, below, symbols);
            if (decoder.starved()) {
                decoder.wrong |= kBadStream;
                break;
            }
        }
        const uint32_t token = token_of_row(matrix, row);
        float values[kBlockSteps];
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i) {
            if (i >= steps) continue;
            const uint32_t channel = c + i;
            unsigned symbol = symbols[i];
            const uint64_t at = static_cast<uint64_t>(row) * matrix.channels + channel;
            if (is_rans) {
                symbol <<= shift;
                for (unsigned bit = 0; bit < shift; ++bit) {
                    const uint32_t plane_bits = *raw++;
                    if (lanes < kLanes && plane_bits >> lanes) decoder.wrong |= kBadStream;
                    symbol |= (plane_bits >> lane & 1) << bit;
                }
                if (symbol > kMaxSymbol && active) decoder.wrong |= kBadStream;
            } else if (active) {
                symbol = matrix.kind == kBytes
                             ? at_address<const uint8_t>(matrix.body)[at]
                             : packed_symbol(matrix.body, matrix.bits, count, at);
            }
            if (matrix.low_bits) {
                unsigned low = matrix.low_centre;
                if (matrix.low && active) low = packed_symbol(matrix.low, matrix.low_bits, count, at);
                symbol = symbol << matrix.low_bits | low;
            }
            if (rotations) {
                const unsigned by = matrix.low_bits ? matrix.low_bits : shift;
                symbol = (symbol + (unsigned{rotations[channel]} << by)) & ((32u << by) - 1) & 0xff;
            }
            if (symbol > largest && active) decoder.wrong |= kBadSymbol;
            values[i] = static_cast<float>(symbol) - static_cast<float>(matrix.levels);
        }
        if (active) {
            float scale = 0;
            uint32_t scale_of = 0xffffffffu;
CACHEGEN_UNROLL
            for (unsigned i = 0; i < kBlockSteps; ++i) {
                if (i >= steps) continue;
                const uint32_t wanted = (c + i) / matrix.scale_width;
                if (wanted != scale_of) {
                    const uint64_t at = static_cast<uint64_t>(row) *
                                            (matrix.channels / matrix.scale_width) + wanted;
                    const uint32_t bits = load_bits(matrix.scales + at * size_of(plane.dtype), plane.dtype);
                    const uint32_t infinity = plane.dtype == kFloat16    ? 0x7c00u
                                              : plane.dtype == kBFloat16 ? 0x7f80u
                                                                         : 0x7f800000u;
                    if (bits >= infinity) decoder.wrong |= kBadScale;
                    scale = quotient(value_of(bits, plane.dtype), static_cast<float>(matrix.levels));
                    scale_of = wanted;
                }
                values[i] = product(values[i], scale);
            }
            if (whole && steps == kBlockSteps) {
                const uint64_t at = row_address(plane, token, c / plane.dim);
                if (at) {
                    const uint64_t out = at + c % plane.dim * size_of(plane.dtype);
                    if (out % 16 == 0) {
                        store_eight(out, values, plane.dtype);
                    } else {
CACHEGEN_UNROLL
                        for (unsigned i = 0; i < kBlockSteps; ++i)
                            store_bits(out + i * size_of(plane.dtype), bits_of(values[i], plane.dtype), plane.dtype);
                    }
                }
            } else {
CACHEGEN_UNROLL
                for (unsigned i = 0; i < kBlockSteps; ++i)
                    if (i < steps) store_value(matrix, plane, row, token, c + i, values[i]);
            }
        }
        step += steps;
    }
    if (is_rans) decoder.close(lane < stream.lanes);
    if (decoder.wrong) atomic_or(at_address<uint32_t>(launch.errors) + matrix.error, decoder.wrong);
}

// The values themselves, as codec raw stores them: `extra` blocks for each matrix.
CACHEGEN_KERNEL(copy_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Matrix& matrix = at_address<const Matrix>(launch.matrices)[launch.first + block_index() / launch.extra];
    const Plane& plane = at_address<const Plane>(launch.planes)[matrix.plane];
    const uint64_t count = static_cast<uint64_t>(matrix.tokens) * matrix.channels;
    const unsigned size = size_of(plane.dtype);
    for (uint64_t at = block_index() % launch.extra * 128 + thread_index(); at < count;
         at += launch.extra * 128) {
        const uint32_t channel = static_cast<uint32_t>(at % matrix.channels);
        const uint64_t row = row_address(plane, static_cast<uint32_t>(at / matrix.channels), channel / plane.dim);
        if (row)
            store_bits(row + channel % plane.dim * size,
                       load_bits(matrix.body + at * size, plane.dtype), plane.dtype);
    }
}

}  // namespace cachegen
