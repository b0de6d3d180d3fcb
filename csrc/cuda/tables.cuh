// Alias tables from frequencies (FORMAT.md, "Alias tables"), one thread for each model, packed for
// the decoder: frozen sets once for each device, the tables of an object as it comes.
#pragma once

#include "rans.cuh"

namespace cachegen {

// A model's buckets: where the own part of each ends, and whose the other part is.
template <unsigned K>
struct Shares {
    uint16_t freq[K], cut[K];
    uint8_t other[K];

    // Returns false for frequencies with another sum than 4096; cut and other are not set then.
    CACHEGEN_DEVICE bool read(const uint8_t* freqs, unsigned alphabet) {
        constexpr unsigned width = kTotal / K;
        uint16_t rest[K];
        uint8_t small[K], large[K];
        unsigned smalls = 0, larges = 0, total = 0;
        for (unsigned s = 0; s < K; ++s) {
            freq[s] = 0;
            if (s < alphabet)
                freq[s] = static_cast<uint16_t>(freqs[2 * s] | freqs[2 * s + 1] << 8);
            total += freq[s];
            rest[s] = freq[s];
            if (rest[s] < width)
                small[smalls++] = static_cast<uint8_t>(s);
            else
                large[larges++] = static_cast<uint8_t>(s);
        }
        if (total != kTotal) return false;
        while (smalls) {
            const unsigned s = small[--smalls], l = large[larges - 1];
            cut[s] = rest[s];
            other[s] = static_cast<uint8_t>(l);
            rest[l] = static_cast<uint16_t>(rest[l] - (width - rest[s]));
            if (rest[l] < width) {
                --larges;
                small[smalls++] = static_cast<uint8_t>(l);
            }
        }
        while (larges) {
            const unsigned l = large[--larges];
            cut[l] = width;
            other[l] = static_cast<uint8_t>(l);
        }
        return true;
    }
};

template <unsigned K>
CACHEGEN_DEVICE void build_model(const uint8_t* freqs, unsigned alphabet, Bucket* out,
                                 uint32_t& wrong) {
    constexpr unsigned width = kTotal / K;
    Shares<K> shares;
    if (!shares.read(freqs, alphabet)) {
        // A table that owns every slot, so that whoever decodes with it stays in range.
        for (unsigned b = 0; b < K; ++b) out[b] = pack_bucket(0, 0, 0, 0, kTotal, 0);
        wrong |= kBadSymbol;
        return;
    }
    const uint16_t(&freq)[K] = shares.freq;
    const uint16_t(&cut)[K] = shares.cut;
    const uint8_t(&other)[K] = shares.other;
    uint16_t rank[K] = {};
    for (unsigned b = 0; b < K; ++b) {
        // Bias: rank of a part's first slot minus that slot; stored with the sign changed.
        const unsigned begin = b * width, middle = begin + cut[b], o = other[b];
        const unsigned own_bias = begin - rank[b];
        rank[b] = static_cast<uint16_t>(rank[b] + cut[b]);
        const unsigned other_bias = middle - rank[o];
        rank[o] = static_cast<uint16_t>(rank[o] + width - cut[b]);
        const unsigned kept = cut[b] == width ? width - 1 : cut[b];
        out[b] = pack_bucket(kept, freq[b], own_bias, o, freq[o], other_bias);
    }
}

// The inverse for the encoder: 2 K parts in order of symbol and rank, each the position at which it
// begins and, 16 bits higher, its slot minus its position; then of each symbol its frequency and, 16
// bits higher, its first position. A position is the number of a slot sorted by symbol and rank.
template <unsigned K>
inline constexpr unsigned kInverseWords = 3 * K;

template <unsigned K>
CACHEGEN_DEVICE void build_inverse(const uint8_t* freqs, unsigned alphabet, uint32_t* out,
                                   uint32_t& wrong) {
    constexpr unsigned width = kTotal / K;
    Shares<K> shares;
    if (!shares.read(freqs, alphabet)) {
        // Whoever encodes with it writes nothing that is used.
        for (unsigned i = 0; i < kInverseWords<K>; ++i) out[i] = 0;
        wrong |= kBadSymbol;
        return;
    }
    uint8_t next[K] = {};  // part at which each symbol's next one goes
    for (unsigned b = 0; b < K; ++b) {
        for (unsigned s = b + 1; s < K; ++s) next[s] = static_cast<uint8_t>(next[s] + (shares.cut[b] > 0));
        for (unsigned s = shares.other[b] + 1u; s < K; ++s)
            next[s] = static_cast<uint8_t>(next[s] + (shares.cut[b] < width));
    }
    uint16_t position[K];
    unsigned first = 0;
    for (unsigned s = 0; s < K; ++s) {
        position[s] = static_cast<uint16_t>(first);
        out[2 * K + s] = first << 16 | shares.freq[s];
        first += shares.freq[s];
    }
    for (unsigned i = 0; i < 2 * K; ++i) out[i] = kTotal;  // beyond every position
    const auto put = [&](unsigned symbol, unsigned slot, unsigned size) {
        if (size == 0) return;
        const unsigned at = position[symbol];
        out[next[symbol]++] = (slot - at) << 16 | at;
        position[symbol] = static_cast<uint16_t>(at + size);
    };
    for (unsigned b = 0; b < K; ++b) {
        put(b, b * width, shares.cut[b]);
        put(shares.other[b], b * width + shares.cut[b], width - shares.cut[b]);
    }
}

// Items are Models; each gets `extra` blocks of 128 threads, enough for the largest. build gets a
// thread's set, the frequencies of its model and the number of buckets before it.
template <class Build>
CACHEGEN_DEVICE void for_each_model(uint64_t address, const Build& build) {
    const Launch& launch = *at_address<const Launch>(address);
    const Models& models = at_address<const Models>(launch.items)[block_index() / launch.extra];
    const unsigned n = block_index() % launch.extra * 128 + thread_index();
    if (n >= models.count) return;
    const uint8_t* const freqs =
        at_address<const uint8_t>(models.freqs) + uint64_t{2} * n * models.alphabet;
    uint32_t wrong = 0;
    build(models, freqs, uint64_t{n} * models.kind, wrong);
    if (wrong) atomic_or(at_address<uint32_t>(launch.errors) + models.error, wrong);
}

CACHEGEN_KERNEL(build_tables)(uint64_t address) {
    for_each_model(address, [](const Models& models, const uint8_t* freqs, uint64_t bucket,
                               uint32_t& wrong) {
        Bucket* const out = at_address<Bucket>(models.buckets) + bucket;
        if (models.kind == 4)
            build_model<4>(freqs, models.alphabet, out, wrong);
        else if (models.kind == 16)
            build_model<16>(freqs, models.alphabet, out, wrong);
        else
            build_model<32>(freqs, models.alphabet, out, wrong);
    });
}

// The same for inverses: Models whose `buckets` are inverses.
CACHEGEN_KERNEL(build_inverses)(uint64_t address) {
    for_each_model(address, [](const Models& models, const uint8_t* freqs, uint64_t bucket,
                               uint32_t& wrong) {
        uint32_t* const out = at_address<uint32_t>(models.buckets) + kInverseWords<1> * bucket;
        if (models.kind == 4)
            build_inverse<4>(freqs, models.alphabet, out, wrong);
        else if (models.kind == 16)
            build_inverse<16>(freqs, models.alphabet, out, wrong);
        else
            build_inverse<32>(freqs, models.alphabet, out, wrong);
    });
}

}  // namespace cachegen
