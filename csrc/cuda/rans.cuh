// rANS on one warp (FORMAT.md, "Coding"): lane l of the stream is lane l of the warp. All loads are
// of memory that the host allotted: words may be read up to a block of steps beyond their end, where
// there is still memory of the same buffer, and the position is checked after each block.
#pragma once

#include "plan.cuh"

namespace cachegen {

// A bucket of an alias table in 64 bits. own: bias | frequency - 1 | cut, 12 + 12 + 8 bits;
// other: bias | frequency - 1 | high bits of the cut | symbol, 12 + 12 + 2 + 6 bits. The symbol of
// the own part is the bucket; biases are never positive, so their magnitude is stored. An own part
// that is the whole bucket has a cut of one less: its last slot goes to the other part, which is
// empty then and of the same symbol and bias.
struct alignas(8) Bucket {
    uint32_t own, other;
};

template <unsigned K>
inline constexpr unsigned kWidthBits = K == 32 ? 7 : K == 16 ? 8 : 10;

CACHEGEN_DEVICE Bucket pack_bucket(unsigned cut, unsigned own_freq, unsigned own_bias,
                                   unsigned other, unsigned other_freq, unsigned other_bias) {
    const auto part = [](unsigned freq, unsigned bias) {
        return bias << 20 | ((freq ? freq - 1 : 0) & 0xfff) << 8;
    };
    return {part(own_freq, own_bias) | (cut & 0xff),
            part(other_freq, other_bias) | (cut >> 8) << 6 | other};
}

// Takes a symbol off the state.
template <unsigned K>
CACHEGEN_DEVICE unsigned take(uint32_t& state, const Bucket* table) {
    const uint32_t slot = state & (kTotal - 1);
    const uint32_t bucket = slot >> kWidthBits<K>;
    const Bucket entry = table[bucket];
    uint32_t cut = entry.own & 0xff;
    if (K == kContextBuckets) cut |= (entry.other & 0xc0) << 2;
    const bool is_own = (slot & ((1u << kWidthBits<K>) - 1)) < cut;
    const uint32_t part = is_own ? entry.own : entry.other;
    state = ((part >> 8 & 0xfff) + 1) * (state >> kProbBits) + slot - (part >> 20);
    return is_own ? bucket : entry.other & 63;
}

// The lane's state and the warp's place among the words of one stream.
struct Decoder {
    uint32_t state;
    const uint16_t* words;
    uint32_t next, count;  // words taken, words there
    uint32_t wrong;

    CACHEGEN_DEVICE void open(const Stream& stream, unsigned lane) {
        const uint8_t* const base = at_address<const uint8_t>(stream.base);
        const bool exists = lane < stream.lanes;
        state = exists ? reinterpret_cast<const uint32_t*>(base)[lane] : kStateMin;
        words = reinterpret_cast<const uint16_t*>(base + stream.words);
        next = 0;
        count = stream.word_count;
        wrong = state < kStateMin ? kBadStream : 0;
    }

    // Lanes below 2^16 take a word each, in lane order.
    CACHEGEN_DEVICE void refill(bool active, uint32_t below) {
        const bool hungry = active && state < kStateMin;
        const uint32_t mask = ballot(hungry);
        if (hungry) state = state << 16 | load_word(words + next + count_bits(mask & below));
        next += count_bits(mask);
    }

    // A block of eight steps takes 256 words at most, four lines of 128 bytes.
    CACHEGEN_DEVICE void look_ahead(unsigned lane) const {
        if (lane < 4 && next + 64 * lane < count) prefetch(words + next + 64 * lane);
    }

    // To be asked after every block: no more than one block may be read beyond the end.
    CACHEGEN_DEVICE bool starved() const { return next > count; }

    CACHEGEN_DEVICE void close(bool exists) {
        if (next != count || (exists && state != kStateMin)) wrong |= kBadStream;
    }
};

// Escape bytes follow in order of step, then lane. Returns the byte for this lane, and counts.
CACHEGEN_DEVICE unsigned take_escape(bool escaped, uint32_t below, const uint8_t* bytes,
                                     uint32_t& next, uint32_t count, uint32_t& wrong) {
    const uint32_t mask = ballot(escaped);
    const uint32_t at = next + count_bits(mask & below);
    next += count_bits(mask);
    if (!escaped) return 0;
    if (at < count) return bytes[at];
    wrong |= kBadStream;
    return 0;
}

// What stands at bit `bit` of a plane of bits.
CACHEGEN_DEVICE unsigned bit_of(const uint8_t* plane, uint64_t bit) {
    return plane[bit >> 3] >> (bit & 7) & 1u;
}

// A symbol of a packed segment of `count` symbols.
CACHEGEN_CALLED unsigned packed_symbol(uint64_t body, unsigned bits, uint64_t count, uint64_t at) {
    const uint8_t* const planes = at_address<const uint8_t>(body);
    const uint64_t plane_bytes = (count + 7) / 8;
    unsigned symbol = 0;
    for (unsigned bit = 0; bit < bits; ++bit)
        symbol |= bit_of(planes + bit * plane_bytes, at) << bit;
    return symbol;
}

// Lanes 0 .. n(p)-1 hold a token at this place (FORMAT.md, "lanes and steps").
CACHEGEN_DEVICE unsigned lanes_at(uint32_t tokens, uint32_t places, uint32_t place) {
    return (tokens - place + places - 1) / places;
}

// The frozen model of progressive for a channel, in the pass whose step is 3^below.
CACHEGEN_DEVICE uint32_t model_of(uint32_t group_class, uint32_t below) {
    int row = static_cast<int>(group_class % kClasses) - 6 * static_cast<int>(below) - kLowestRow;
    row = row < 0 ? 0 : row > static_cast<int>(kRows) - 1 ? static_cast<int>(kRows) - 1 : row;
    return group_class / kClasses * kRows + static_cast<uint32_t>(row);
}

}  // namespace cachegen
