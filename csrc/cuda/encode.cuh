// rANS the other way (FORMAT.md, "Coding"): one warp writes one stream, from its last step to its
// first, words and escape bytes from the end of their room. What does not fit is counted but not
// written, and the host is told.
#pragma once

#include "climb.cuh"
#include "rans.cuh"
#include "sparse.cuh"

namespace cachegen {

// The lane's state, and how much the warp has written of one stream.
struct Encoder {
    uint32_t state;
    uint16_t* words_end;
    uint8_t* escapes_end;
    uint32_t word_count, word_room, escape_count, escape_room;
    uint32_t wrong;

    CACHEGEN_DEVICE void open(const Run& run) {
        state = kStateMin;
        words_end = at_address<uint16_t>(run.words) + run.word_room;
        escapes_end = at_address<uint8_t>(run.escapes) + run.escape_room;
        word_room = run.word_room;
        escape_room = run.escape_room;
        word_count = escape_count = 0;
        wrong = 0;
    }

    // Codes a symbol of every active lane. table: of the lane, as build_inverse makes them.
    template <unsigned K>
    CACHEGEN_DEVICE void put(const uint32_t* table, uint32_t symbol, bool active, uint32_t above) {
        const uint32_t entry = table[2 * K + symbol];
        const uint32_t freq = entry & 0xffff, first = entry >> 16;
        if (active && freq == 0) wrong |= kBadSymbol;
        const bool spills = active && (state >> 20) >= freq && freq;
        const uint32_t mask = ballot(spills);
        if (spills) {
            // The decoder takes a step's words in lane order, so higher lanes come behind.
            const uint32_t back = word_count + count_bits(mask & above) + 1;
            if (back <= word_room) words_end[-static_cast<int64_t>(back)] = static_cast<uint16_t>(state);
            state >>= 16;
        }
        word_count += count_bits(mask);
        if (!active || freq == 0) return;
        const uint32_t quotient = state / freq, position = first + state - quotient * freq;
        unsigned part = 0;
CACHEGEN_UNROLL
        for (unsigned half = K; half; half /= 2)
            part += (table[part + half] & 0xffff) <= position ? half : 0;
        const uint32_t slot = (position + (table[part] >> 16)) & 0xffff;
        state = quotient << kProbBits | slot;
    }

    CACHEGEN_DEVICE void put_escape(bool escaped, uint32_t byte, uint32_t above) {
        const uint32_t mask = ballot(escaped);
        if (escaped) {
            const uint32_t back = escape_count + count_bits(mask & above) + 1;
            if (back <= escape_room)
                escapes_end[-static_cast<int64_t>(back)] = static_cast<uint8_t>(byte);
        }
        escape_count += count_bits(mask);
    }

    CACHEGEN_DEVICE void close(const Run& run, unsigned lane) {
        if (lane < run.lanes) at_address<uint32_t>(run.states)[lane] = state;
        if (word_count > word_room || escape_count > escape_room) wrong |= kOutOfRoom;
        if (lane != 0) return;
        at_address<uint32_t>(run.counts)[0] = word_count;
        at_address<uint32_t>(run.counts)[1] = escape_count;
    }
};

// Lanes above one's own.
CACHEGEN_DEVICE uint32_t lanes_above(unsigned lane) { return lane == 31 ? 0 : ~0u << (lane + 1); }

// The block of steps before `end`: they lie in one place and within eight channels.
struct StepBlock {
    uint32_t place, channel, steps;

    CACHEGEN_DEVICE StepBlock(uint32_t begin_step, uint32_t end, uint32_t channels) {
        const uint32_t last = end - 1, c = last % channels;
        place = last / channels;
        steps = min_of(min_of(c % kBlockSteps + 1, end - begin_step), c + 1);
        channel = c + 1 - steps;
    }
};

// Of a value, what a pass codes.
struct Coded {
    uint32_t symbol, context;
};

CACHEGEN_DEVICE Coded coded_at(float value, uint32_t pass, uint32_t coarse) {
    Climber climber(value, coarse);
    if (pass == 0) return {climber.coarse_symbol(), 0};
    Coded coded{0, 0};
    for (uint32_t j = 0; j < pass; ++j) {
        coded.context = climber.significant;
        coded.symbol = climber.next();
    }
    return coded;
}

// Whether pass 0 of a group is written as places; then it is not coded.
CACHEGEN_DEVICE bool is_sparse(const Source& source) {
    return kSparseShare * result_of(source).nonzero <= uint64_t{source.tokens} * source.channels;
}

// Lists the symbols of pass 0 that are not 0. They are few, so lanes may go their own ways.
CACHEGEN_CALLED void list_symbols(const Launch& launch, const Source& source, const Run& run) {
    GroupResult& result = result_of(source);
    const uint32_t places = (source.tokens + kLanes - 1) / kLanes, channels = source.channels;
    const uint32_t coarse = power_of_three(source.passes - 1);
    const float inverse = quotient(1.0f, chunk_step(launch, source));
    const float* const means = at_address<const float>(source.means);
    uint2* const pairs = at_address<uint2>(source.pairs);
    for (uint32_t step = run.begin_step, count; step < run.end_step; step += count) {
        const uint32_t place = step / channels, first = step % channels;
        const uint32_t token = lane_index() * places + place;
        count = min_of(run.end_step - step, channels - first);
        if (token >= source.tokens || is_exempt(source, token)) continue;
        for (uint32_t i = 0; i < count; ++i) {
            const float value = scaled_at(source, token, first + i, means[first + i], inverse);
            const uint32_t symbol = Climber(value, coarse).coarse_symbol();
            if (!symbol) continue;
            const uint32_t at = atomic_add(&result.listed, 1);
            if (at < result.nonzero) pairs[at] = uint2{(step + i) * kLanes + lane_index(), symbol};
        }
    }
}

// One pass of one group; launch.coarse and refine: inverses of the frozen tables.
CACHEGEN_KERNEL(encode_progressive)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned index = warp_of_launch(), lane = lane_index();
    if (index >= launch.count) return;
    const Run& run = at_address<const Run>(launch.streams)[index];
    const Source& source = source_of(launch, run.owner);
    if (run.pass == 0 && is_sparse(source)) return list_symbols(launch, source, run);
    uint32_t* const tile = reinterpret_cast<uint32_t*>(block_shared()) +
                           thread_index() / kLanes * kBlockSteps * kInverseWords<32>;
    const uint32_t above = lanes_above(lane), places = (source.tokens + kLanes - 1) / kLanes;
    const uint32_t below = source.passes - 1 - run.pass;
    const float inverse = quotient(1.0f, chunk_step(launch, source));
    const float* const means = at_address<const float>(source.means);
    const uint32_t coarse = power_of_three(source.passes - 1);
    const uint8_t* const classes = at_address<const uint8_t>(source.classes);
    const uint8_t* const escape_of = at_address<const uint8_t>(launch.coarse_escapes);
    const uint32_t* const tables = at_address<const uint32_t>(run.pass ? launch.refine : launch.coarse);
    const unsigned words = run.pass ? 2 * kInverseWords<4> : kInverseWords<32>;

    Encoder encoder;
    encoder.open(run);
    for (uint32_t end = run.end_step; end > run.begin_step;) {
        const StepBlock block(run.begin_step, end, source.channels);
        const bool active = lane < lanes_at(source.tokens, places, block.place);
        const uint32_t token = lane * places + block.place;
        const bool is_zero = active && is_exempt(source, token);
        Coded coded[kBlockSteps];
CACHEGEN_UNROLL
        for (unsigned i = 0; i < kBlockSteps; ++i) {
            coded[i] = Coded{0, 0};
            if (i >= block.steps || !active) continue;
            const uint32_t c = block.channel + i;
            const float value = is_zero ? 0.0f : scaled_at(source, token, c, means[c], inverse);
            coded[i] = coded_at(value, run.pass, coarse);
        }
        const uint32_t mine = block.channel + min_of(lane % kBlockSteps, block.steps - 1);
        const uint32_t model = model_of(classes[mine], below);
        const uint32_t escape = run.pass ? 0xffffu : escape_of[model];
        sync_warp();
        for (unsigned i = 0; i < block.steps; ++i) {
            const uint32_t* const table = tables + uint64_t{shuffle(model, i)} * words;
            for (unsigned at = lane; at < words; at += kLanes) tile[i * words + at] = table[at];
        }
        sync_warp();
CACHEGEN_UNROLL
        for (unsigned i = kBlockSteps; i-- > 0;) {
            if (i >= block.steps) continue;
            const uint32_t* const table = tile + i * words;
            if (run.pass) {
                encoder.put<4>(table + coded[i].context * kInverseWords<4>, coded[i].symbol, active, above);
                continue;
            }
            const uint32_t last = shuffle(escape, i);
            const bool escaped = active && coded[i].symbol >= last;
            encoder.put_escape(escaped, coded[i].symbol - last, above);
            encoder.put<32>(table, escaped ? last : coded[i].symbol, active, above);
        }
        end -= block.steps;
    }
    encoder.close(run, lane);
    if (encoder.wrong) give_up(launch, source.error, encoder.wrong);
}

}  // namespace cachegen
