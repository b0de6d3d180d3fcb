// What was encoded, put beside each other for the way to the host.
#pragma once

#include "quantise.cuh"

namespace cachegen {

// Kinds of Plain.
inline constexpr uint32_t kCoarseBytes = 0;   // pass 0 of a Source, a byte a symbol
inline constexpr uint32_t kDigitPlanes = 1;   // a later pass, two planes of bits
inline constexpr uint32_t kSymbolBytes = 2;   // symbols of a matrix, a byte each
inline constexpr uint32_t kSymbolPlanes = 3;  // `bits` planes of the bits from `pass` on
inline constexpr uint32_t kRotatedPlanes = 4; // the same after rotation
inline constexpr uint32_t kExactRows = 5;          // rows of a Source's planes as they are

// A warp copies one Span after the other; `count` of them, `extra` warps.
CACHEGEN_KERNEL(copy_spans)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    for (uint32_t index = warp_of_launch(); index < launch.count; index += launch.extra) {
        const Span& span = at_address<const Span>(launch.items)[index];
        if ((span.from | span.to) % 4 == 0) {
            const uint32_t* const from = at_address<const uint32_t>(span.from);
            uint32_t* const to = at_address<uint32_t>(span.to);
            for (uint32_t i = lane_index(); i < span.size / 4; i += kLanes) to[i] = from[i];
        } else {
            const uint8_t* const from = at_address<const uint8_t>(span.from);
            uint8_t* const to = at_address<uint8_t>(span.to);
            for (uint32_t i = lane_index(); i < span.size / 4 * 4; i += kLanes) to[i] = from[i];
        }
        if (lane_index() < span.size % 4) {
            const uint32_t at = span.size / 4 * 4 + lane_index();
            at_address<uint8_t>(span.to)[at] = at_address<const uint8_t>(span.from)[at];
        }
    }
}

CACHEGEN_DEVICE uint32_t plain_symbol(const Launch& launch, const Plain& plain, uint64_t at) {
    if (plain.what < kSymbolBytes) {
        const Source& source = source_of(launch, plain.owner);
        const auto token = static_cast<uint32_t>(at / source.channels);
        const auto channel = static_cast<uint32_t>(at % source.channels);
        const float mean = at_address<const float>(source.means)[channel];
        const float inverse = quotient(1.0f, chunk_step(launch, source));
        const float value =
            is_exempt(source, token) ? 0.0f : scaled_at(source, token, channel, mean, inverse);
        return coded_at(value, plain.pass, power_of_three(source.passes - 1)).symbol;
    }
    const Symbols& matrix = symbols_of(launch, plain.owner);
    const uint32_t symbol = at_address<const uint8_t>(matrix.symbols)[at];
    if (plain.what == kSymbolBytes) return symbol;
    const bool turn = plain.what == kRotatedPlanes;
    return (turn ? rotated(matrix, symbol, at % matrix.channels) : symbol) >> plain.pass;
}

// Rows of all planes of a group, one row after the other.
CACHEGEN_DEVICE void take_rows(const Launch& launch, const Plain& plain, uint64_t begin, uint64_t by) {
    const Source& source = source_of(launch, plain.owner);
    for (uint64_t at = begin; at < uint64_t{plain.count} * source.channels; at += by) {
        const auto channel = static_cast<uint32_t>(at % source.channels);
        const uint32_t token = at_address<const uint32_t>(plain.tokens)[at / source.channels];
        const Plane* plane = at_address<const Plane>(launch.planes) + source.plane;
        while (channel >= plane->first_channel + plane->heads * plane->dim) ++plane;
        const uint32_t inside = channel - plane->first_channel;
        const unsigned size = size_of(plane->dtype);
        const uint64_t row = row_address(*plane, token, inside / plane->dim);
        store_bits(plain.to + at * size, load_element(row + inside % plane->dim * size, plane->dtype),
                   plane->dtype);
    }
}

// `extra` blocks for each Plain. Planes of bits are written 32 symbols at a time.
CACHEGEN_KERNEL(write_plain)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Plain& plain = at_address<const Plain>(launch.items)[block_index() / launch.extra];
    const uint64_t begin = block_index() % launch.extra * 128 + thread_index(), by = launch.extra * 128;
    if (plain.what == kExactRows) return take_rows(launch, plain, begin, by);
    uint64_t count = 0;
    if (plain.what < kSymbolBytes) {
        const Source& source = source_of(launch, plain.owner);
        count = uint64_t{source.tokens} * source.channels;
    } else {
        const Symbols& matrix = symbols_of(launch, plain.owner);
        count = uint64_t{matrix.tokens} * matrix.channels;
    }
    uint8_t* const out = at_address<uint8_t>(plain.to);
    if (plain.bits == 8) {
        for (uint64_t at = begin; at < count; at += by)
            out[at] = static_cast<uint8_t>(plain_symbol(launch, plain, at));
        return;
    }
    const uint64_t plane_bytes = (count + 7) / 8;
    // All lanes of a warp stay together: begin and by are those of whole warps.
    for (uint64_t first = begin - lane_index(); first < count; first += by) {
        const uint64_t at = first + lane_index();
        const uint32_t symbol = at < count ? plain_symbol(launch, plain, at) : 0;
        for (unsigned bit = 0; bit < plain.bits; ++bit) {
            const uint32_t mask = ballot(symbol >> bit & 1);
            const uint64_t byte = first / 8 + lane_index();
            if (lane_index() < 4 && byte < plane_bytes)
                out[bit * plane_bytes + byte] = static_cast<uint8_t>(mask >> 8 * lane_index());
        }
    }
}

}  // namespace cachegen
