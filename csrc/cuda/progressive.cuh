// progressive: all passes of a stream together. A warp decodes one channel of 32 tokens per step;
// pass 0 says in which cell a value lies, later passes cut the cell, with the context they have just
// learnt from the passes before. Where no transform follows, values are finished and stored here,
// else coefficients go to the workspace.
#pragma once

#include "rans.cuh"
#include "sink.cuh"
#include "sparse.cuh"

namespace cachegen {

inline constexpr float kDeadZone = 0.6f;

// Of a channel, for the eight steps at hand. early and late are what is added to the inner edge of
// a cell, in finest steps: width * centroid, for cells of one step and for those 1.2 steps wide.
struct Channel {
    float early, late, mean;
    uint32_t escape;
};

// Where the values of a warp go: the plane at hand.
struct Sink {
    Plane plane;
    uint32_t index;      // of the plane
    uint32_t plane_end;  // first channel behind it
    uint32_t turns;      // pairs of channels that RoPE turns here, 0 for none
    uint32_t zero;
};

// Shared memory of a warp: tables and channels of eight steps, and the first half of a head's
// channels where RoPE will turn them with the second half.
struct WarpMemory {
    Bucket coarse[kBlockSteps * 32];
    Bucket refine[kMaxPasses - 1][kBlockSteps * 8];
    Channel channels[kBlockSteps];
    Sink sink;

    CACHEGEN_DEVICE float* first_half() { return reinterpret_cast<float*>(this + 1); }
};

inline constexpr uint32_t kWarpBytes = 4816;  // the host asks for so many, and 128 a pair
static_assert(sizeof(WarpMemory) == kWarpBytes);

// Eight values of a lane, side by side.
struct Eight {
    float v[kBlockSteps];
};

// A small integer as float, without the slow conversion.
CACHEGEN_DEVICE float small_float(uint32_t n) { return as_float(0x4b000000u | n) - 8388608.0f; }

CACHEGEN_DEVICE float power_of_3(uint32_t n) {
    float power = 1;
    for (uint32_t i = 0; i < n; ++i) power *= 3;
    return power;
}

// Fills tables and channels for `steps` channels from c on. All lanes of the warp help.
template <unsigned kPasses>
CACHEGEN_DEVICE void load_block(const Launch& launch, const Group& group, bool coarse_is_coded,
                                uint32_t c, unsigned steps, unsigned lane, WarpMemory& memory) {
    const uint32_t mine = c + min_of(lane % kBlockSteps, steps - 1);
    const uint32_t group_class = at_address<const uint8_t>(group.classes)[mine];
    const uint32_t coarse_model = model_of(group_class, group.total_passes - 1);
    if (lane < kBlockSteps) {
        const float2 add = at_address<const float2>(group.constants)[group_class % kClasses];
        const float mean = group.means ? at_address<const float>(group.means)[mine] : 0.0f;
        const uint32_t escape = at_address<const uint8_t>(launch.coarse_escapes)[coarse_model];
        memory.channels[lane] = Channel{add.x, add.y, mean, escape};
    }
    if (coarse_is_coded) {
        const Bucket* const coarse = at_address<const Bucket>(launch.coarse);
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i)
            memory.coarse[i * 32 + lane] = coarse[shuffle(coarse_model, i) * 32 + lane];
    }
    // Both contexts of a refinement are 8 buckets, so 32 lanes load those of four channels.
    const Bucket* const refine = at_address<const Bucket>(launch.refine);
CACHEGEN_UNROLL
    for (unsigned j = 1; j < kPasses; ++j) {
        const uint32_t model = model_of(group_class, group.total_passes - 1 - j);
CACHEGEN_UNROLL
        for (unsigned half = 0; half < 2; ++half) {
            const uint32_t row = shuffle(model, half * 4 + lane / 8);
            memory.refine[j - 1][half * 32 + lane] = refine[row * 8 + lane % 8];
        }
    }
}

// What a lane knows of its eight values: the inner edge of the cell, in finest steps, and, a bit for
// each, whether it is not zero, became so late, is negative.
struct Values {
    float edge[kBlockSteps];
    uint32_t coarse[kBlockSteps];
    uint32_t significant, late, negative;
};

// sparse: eight bits for each step, symbols of pass 0 where it is sparse.
template <unsigned kPasses>
CACHEGEN_DEVICE void decode_block(const Group& group, Decoder (&decoders)[kPasses],
                                  const bool (&is_coded)[kPasses], bool is_sparse,
                                  uint64_t sparse, const float (&sizes)[kPasses],
                                  const WarpMemory& memory, uint32_t row, uint32_t c,
                                  unsigned steps, bool active, uint32_t below, Values& values,
                                  uint32_t& wrong) {
    values.significant = values.late = values.negative = 0;
    const uint64_t count = static_cast<uint64_t>(group.tokens) * group.channels;
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        values.edge[i] = 0;
        values.coarse[i] = 0;
        if (i >= steps) continue;
        const uint64_t at = static_cast<uint64_t>(row) * group.channels + c + i;
        uint32_t symbol = 0;
        if (is_coded[0]) {
            uint32_t state = decoders[0].state;
            symbol = take<32>(state, memory.coarse + i * 32);
            if (active) decoders[0].state = state;
            decoders[0].refill(active, below);
        } else if (is_sparse) {
            symbol = sparse >> 8 * i & 0xff;
        } else if (active) {
            symbol = at_address<const uint8_t>(group.passes[0].body)[at];
        }
        values.coarse[i] = symbol;
        bool significant = symbol != 0, late = false, negative = symbol & 1;
        float edge = (small_float((symbol + 1) >> 1) - (1 - kDeadZone)) * sizes[0];
CACHEGEN_UNROLL
        for (unsigned j = 1; j < kPasses; ++j) {
            const float step = sizes[j];
            uint32_t digit = 1;
            if (is_coded[j]) {
                uint32_t state = decoders[j].state;
                digit = take<4>(state, memory.refine[j - 1] + i * 8 + (significant ? 4 : 0));
                if (active) decoders[j].state = state;
                decoders[j].refill(active, below);
            } else if (active) {
                digit = packed_symbol(group.passes[j].body, 2, count, at);
            }
            if (digit > 2) wrong |= active ? kBadSymbol : 0;
            // Choices and no branches: lanes differ.
            const bool fresh = !significant && digit != 1;
            const float cut = edge + small_float(digit) * (late ? 2 * kDeadZone * step : step);
            edge = significant ? cut : kDeadZone * step;
            negative = fresh ? digit == 0 : negative;
            late |= fresh;
            significant |= fresh;
        }
        values.edge[i] = edge;
        values.significant |= static_cast<uint32_t>(significant) << i;
        values.late |= static_cast<uint32_t>(late) << i;
        values.negative |= static_cast<uint32_t>(negative) << i;
    }
}

struct Escaped {
    Values values;
    uint32_t taken, wrong;
};

// Adds the escape bytes of pass 0 to its symbols.
CACHEGEN_CALLED Escaped add_escapes(uint64_t bytes, uint32_t count, float coarse_step,
                                    const WarpMemory& memory, unsigned steps, bool active,
                                    Escaped all) {
    const uint32_t below = (1u << lane_index()) - 1;
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        if (i >= steps) continue;
        const uint32_t symbol = all.values.coarse[i];
        const bool escaped = active && symbol == memory.channels[i].escape;
        const unsigned more = take_escape(escaped, below, at_address<const uint8_t>(bytes),
                                          all.taken, count, all.wrong);
        if (!escaped) continue;
        const uint32_t whole = symbol + more;
        if (whole > 2 * 127) all.wrong |= kBadSymbol;
        const uint32_t magnitude = ((whole + 1) >> 1) - ((symbol + 1) >> 1);
        all.values.edge[i] += small_float(magnitude) * coarse_step;
        all.values.negative = (all.values.negative & ~(1u << i)) | (whole & 1) << i;
    }
    return all;
}

CACHEGEN_DEVICE void enter_plane(const Launch& launch, uint32_t c, uint32_t from, Sink& sink) {
    const Plane* const planes = at_address<const Plane>(launch.planes);
    uint32_t index = from;
    while (c >= planes[index].first_channel + planes[index].heads * planes[index].dim) ++index;
    const Plane plane = planes[index];
    sync_warp();  // nobody reads the old plane any more
    if (lane_index() == 0) {
        sink.plane = plane;
        sink.index = index;
        sink.plane_end = plane.first_channel + plane.heads * plane.dim;
        sink.turns = plane.rope ? plane.half : 0;
    }
    sync_warp();
}

// Values of several channels that are no whole block of eight of one head: one by one, no RoPE.
CACHEGEN_DEVICE void store_each(const Launch& launch, const Sink& sink, uint32_t c, unsigned steps,
                                uint32_t token, const Eight& eight) {
    const Plane* plane = at_address<const Plane>(launch.planes) + sink.index;
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        if (i >= steps) continue;
        while (c + i >= plane->first_channel + plane->heads * plane->dim) ++plane;
        const uint32_t inside = c + i - plane->first_channel;
        const uint64_t row = row_address(*plane, token, inside / plane->dim);
        const float value = clamped(quotient(eight.v[i], plane->divisor), plane->dtype);
        if (row)
            store_bits(row + inside % plane->dim * size_of(plane->dtype),
                       bits_of(value, plane->dtype), plane->dtype);
    }
}

CACHEGEN_DEVICE void finish_eight(const Plane& plane, uint64_t address, Eight& eight) {
    const uint32_t dtype = plane.dtype;
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) eight.v[i] = clamped(eight.v[i], dtype);
    if (address % 16 == 0) {
        store_eight(address, eight.v, dtype);
        return;
    }
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i)
        store_bits(address + i * size_of(dtype), bits_of(eight.v[i], dtype), dtype);
}

// A block of channels. Of channels that RoPE turns, the first half of a head waits in shared memory
// for its partners.
CACHEGEN_CALLED void store_block(const Launch& launch, WarpMemory& memory, uint32_t c,
                                 unsigned steps, uint32_t token, bool active, uint32_t place,
                                 Eight eight) {
    const Sink& sink = memory.sink;
    const Plane& plane = sink.plane;
    if (steps != kBlockSteps || plane.dim % kBlockSteps) {
        if (active) store_each(launch, sink, c, steps, token, eight);
        return;
    }
    const unsigned lane = lane_index();
    const uint32_t inside = c - plane.first_channel;
    const uint32_t head = inside / plane.dim, d = inside % plane.dim;
    const unsigned size = size_of(plane.dtype);
    const uint64_t row = active ? row_address(plane, token, head) : 0;
    if (d >= 2 * sink.turns) {
        if (plane.divisor != 1) {
CACHEGEN_UNROLL
            for (unsigned i = 0; i < kBlockSteps; ++i)
                eight.v[i] = quotient(eight.v[i], plane.divisor);
        }
        if (row) finish_eight(plane, row + d * size, eight);
        return;
    }
    float* const waiting = memory.first_half() + lane;
    if (d < sink.turns) {
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i) waiting[(d + i) * kLanes] = eight.v[i];
        return;
    }
    const uint32_t pair = d - sink.turns;
    const float2* const angles =
        at_address<const float2>(plane.rope) +
        (static_cast<uint64_t>(place) * plane.half + pair) * kLanes + lane;
    Eight first;
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        const float2 angle = angles[i * kLanes];
        const float a = waiting[(pair + i) * kLanes];
        first.v[i] = turned(a, eight.v[i], angle, false);
        eight.v[i] = turned(eight.v[i], a, angle, true);
    }
    if (!row) return;
    finish_eight(plane, row + pair * size, first);
    finish_eight(plane, row + d * size, eight);
}

// Coefficients in finest steps: two halves, the rounded value and what rounding lost, side by side
// in two matrices; without a basis floats that are finished but for RoPE.
CACHEGEN_CALLED void store_coefficients(const Group& group, uint32_t c, unsigned steps,
                                        uint32_t token, Eight eight) {
    const float(&v)[kBlockSteps] = eight.v;
    const uint64_t at = static_cast<uint64_t>(token) * group.stride + c;
    if (!group.basis) {
        float* const out = at_address<float>(group.coefficients) + at;
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i)
            if (i < steps) out[i] = v[i];
        return;
    }
    uint16_t* const high = at_address<uint16_t>(group.coefficients) + at;
    uint16_t* const low = high + static_cast<uint64_t>(group.tokens) * group.stride;
    float rounded[kBlockSteps], lost[kBlockSteps];
CACHEGEN_UNROLL
    for (unsigned i = 0; i < kBlockSteps; ++i) {
        rounded[i] = i < steps ? v[i] : 0.0f;
        lost[i] = rounded[i] - float16_value(float16_pair(rounded[i], 0.0f) & 0xffff);
    }
    // The stride is a multiple of eight and so is c: whole blocks fit, padding included.
    store_eight(reinterpret_cast<uint64_t>(high), rounded, kFloat16);
    store_eight(reinterpret_cast<uint64_t>(low), lost, kFloat16);
}

template <unsigned kPasses>
CACHEGEN_DEVICE void decode_group(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = thread_index() / kLanes, lane = lane_index();
    const uint32_t index = block_index() * 4 + warp;
    if (index >= launch.count) return;
    const Stream* const streams = at_address<const Stream>(launch.streams);
    const Stream& stream = streams[launch.first + index];
    const Group& group = at_address<const Group>(launch.groups)[stream.owner];
    WarpMemory& memory =
        *reinterpret_cast<WarpMemory*>(block_shared() + warp * (kWarpBytes + launch.extra * kLanes * 4));
    const uint32_t below = (1u << lane) - 1;

    Decoder decoders[kPasses];
    bool is_coded[kPasses];
    float sizes[kPasses];  // the step of each pass, in finest steps
CACHEGEN_UNROLL
    for (unsigned j = 0; j < kPasses; ++j) {
        sizes[j] = power_of_3(group.total_passes - 1 - j);
        is_coded[j] = group.passes[j].kind == kRans;
        decoders[j] = Decoder{kStateMin, nullptr, 0, 0, 0};
        if (is_coded[j]) decoders[j].open(streams[group.passes[j].first_stream + stream.first], lane);
    }
    const bool is_sparse = group.passes[0].kind == kSparse;
    SparseReader pairs{};
    if (is_sparse) pairs.open(stream.base);
    uint32_t wrong = 0, escapes_taken = 0, last_active = 0;
    uint32_t current_place = 0xffffffffu, plane_end = 0;

    for (uint32_t step = stream.begin_step; step < stream.end_step;) {
        const uint32_t place = step / group.channels, c = step % group.channels;
        const uint32_t left = min_of(stream.end_step - step, group.channels - c);
        const unsigned steps = min_of(left, kBlockSteps - c % kBlockSteps);
        const bool active = lane < lanes_at(group.tokens, group.places, place);
        const uint32_t token = lane * group.places + place;
        if (place != current_place || c >= plane_end) {
            const bool anew = place != current_place;
            enter_plane(launch, c, anew ? group.plane : memory.sink.index, memory.sink);
            plane_end = memory.sink.plane_end;
            current_place = place;
        }
CACHEGEN_UNROLL
        for (unsigned j = 0; j < kPasses; ++j) decoders[j].look_ahead(lane);
        sync_warp();
        load_block<kPasses>(launch, group, is_coded[0], c, steps, lane, memory);
        sync_warp();
        const uint64_t sparse = is_sparse ? pairs.take(step, steps, lane) : 0;

        Values values;
        decode_block<kPasses>(group, decoders, is_coded, is_sparse, sparse, sizes, memory, token, c, steps, active, below, values, wrong);
        bool starved = false, escaped = false;
CACHEGEN_UNROLL
        for (unsigned j = 0; j < kPasses; ++j) starved |= decoders[j].starved();
        if (starved) {
            wrong |= kBadStream;
            break;
        }
        if (is_coded[0]) {
CACHEGEN_UNROLL
            for (unsigned i = 0; i < kBlockSteps; ++i)
                escaped |= active && i < steps && values.coarse[i] == memory.channels[i].escape;
            if (ballot(escaped)) {
                const Escaped all = add_escapes(stream.base + stream.escapes, stream.escape_count,
                                                sizes[0], memory, steps, active,
                                                Escaped{values, escapes_taken, wrong});
                values = all.values;
                escapes_taken = all.taken;
                wrong = all.wrong;
            }
        } else {
CACHEGEN_UNROLL
            for (unsigned i = 0; i < kBlockSteps; ++i)
                if (active && values.coarse[i] > 2 * 127) wrong |= kBadSymbol;
        }

        Eight eight;
        float(&v)[kBlockSteps] = eight.v;
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i) {
            const Channel& channel = memory.channels[i];
            const float size = values.edge[i] + (values.late >> i & 1 ? channel.late : channel.early);
            v[i] = values.significant >> i & 1 ? size : 0.0f;
            if (values.negative >> i & 1) v[i] = -v[i];
        }
        if (active && values.significant && c + steps > last_active) last_active = c + steps;
        if (!group.basis) {
CACHEGEN_UNROLL
            for (unsigned i = 0; i < kBlockSteps; ++i)
                v[i] = sum(product(v[i], group.step), memory.channels[i].mean);
        }
        if (!group.coefficients)
            store_block(launch, memory, c, steps, token, active, place, eight);
        else if (active)
            store_coefficients(group, c, steps, token, eight);
        step += steps;
    }
CACHEGEN_UNROLL
    for (unsigned j = 0; j < kPasses; ++j) {
        if (!is_coded[j]) continue;
        decoders[j].close(lane < stream.lanes);
        wrong |= decoders[j].wrong;
    }
    if (is_coded[0] && escapes_taken != stream.escape_count) wrong |= kBadStream;
    if (wrong) atomic_or(at_address<uint32_t>(launch.errors) + group.error, wrong);
    if (group.basis && last_active)
        atomic_max(at_address<uint32_t>(launch.active) + group.active, last_active);
}

CACHEGEN_KERNEL(decode_progressive_1)(uint64_t address) { decode_group<1>(address); }
CACHEGEN_KERNEL(decode_progressive_2)(uint64_t address) { decode_group<2>(address); }
CACHEGEN_KERNEL(decode_progressive_3)(uint64_t address) { decode_group<3>(address); }
CACHEGEN_KERNEL(decode_progressive_4)(uint64_t address) { decode_group<4>(address); }
CACHEGEN_KERNEL(decode_progressive_5)(uint64_t address) { decode_group<5>(address); }
CACHEGEN_KERNEL(decode_progressive_6)(uint64_t address) { decode_group<6>(address); }

}  // namespace cachegen
