// Alias tables from frequencies (FORMAT.md, "Alias tables"), one thread for each model, packed for
// the decoder: frozen sets once for each device, the tables of an object as it comes.
#pragma once

#include "rans.cuh"

namespace cachegen {

template <unsigned K>
CACHEGEN_DEVICE void build_model(const uint8_t* freqs, unsigned alphabet, Bucket* out,
                                 uint32_t& wrong) {
    constexpr unsigned width = kTotal / K;
    uint16_t freq[K], rest[K], cut[K], rank[K];
    uint8_t other[K], small[K], large[K];
    unsigned smalls = 0, larges = 0, total = 0;
    for (unsigned s = 0; s < K; ++s) {
        freq[s] = 0;
        if (s < alphabet)
            freq[s] = static_cast<uint16_t>(freqs[2 * s] | freqs[2 * s + 1] << 8);
        total += freq[s];
        rest[s] = freq[s];
        rank[s] = 0;
        if (rest[s] < width)
            small[smalls++] = static_cast<uint8_t>(s);
        else
            large[larges++] = static_cast<uint8_t>(s);
    }
    if (total != kTotal) {
        // A table that owns every slot, so that whoever decodes with it stays in range.
        for (unsigned b = 0; b < K; ++b) out[b] = pack_bucket(0, 0, 0, 0, kTotal, 0);
        wrong |= kBadSymbol;
        return;
    }
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

// Items are Models; each gets `extra` blocks of 128 threads, enough for the largest.
CACHEGEN_KERNEL(build_tables)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Models& models = at_address<const Models>(launch.items)[block_index() / launch.extra];
    const unsigned n = block_index() % launch.extra * 128 + thread_index();
    if (n >= models.count) return;
    const uint8_t* const freqs =
        at_address<const uint8_t>(models.freqs) + uint64_t{2} * n * models.alphabet;
    Bucket* const out = at_address<Bucket>(models.buckets) + uint64_t{n} * models.kind;
    uint32_t wrong = 0;
    if (models.kind == 4)
        build_model<4>(freqs, models.alphabet, out, wrong);
    else if (models.kind == 16)
        build_model<16>(freqs, models.alphabet, out, wrong);
    else
        build_model<32>(freqs, models.alphabet, out, wrong);
    if (wrong) atomic_or(at_address<uint32_t>(launch.errors) + models.error, wrong);
}

}  // namespace cachegen
