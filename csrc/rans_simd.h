// What the SIMD decoders have in common: several streams side by side, and the end of the words.
// An instruction set `Isa` brings
//     size_t kSideBySide                    streams that the registers hold, a power of two
//     struct Lanes                          the 32 states of a stream in registers
//     Lanes load(const uint32_t* state)     and store(Lanes, uint32_t* state)
//     Active active_lanes(unsigned count)   a mask
// and a `Coder<Isa>`, one for each stream, what a step looks up and where results go:
//     Table                                 what the models are
//     Coder(const DecodeRun&)
//     size_t step(Lanes&, Active, const Table*, model, words, step)
//     void finish(DecodeRun&, steps)
// `step` decodes one symbol in each lane and returns how many words it took; it may read, but not
// use, 2 * kLanes bytes from `words` on.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "dispatch.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker: each has other compiler flags

inline constexpr size_t kUncheckedSteps = kWordSlack / (2 * kLanes);

inline constexpr size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Unsigned, unlike std::popcount: addresses need no sign extension then.
inline size_t count_bits(uint32_t bits) { return static_cast<uint32_t>(std::popcount(bits)); }

template <class Isa, class Coder, size_t N>
void decode_side_by_side(const typename Coder::Table* tables, DecodeRun* const* runs,
                         size_t steps) {
    typename Isa::Lanes lanes[N];
    typename Isa::Active active[N];
    // Copies, because the compiler must assume that storing symbols changes the runs.
    const uint8_t* words[N];
    const uint16_t* models[N];
    const auto coders = [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array<Coder, N>{Coder(*runs[I])...};
    };
    auto coder = coders(std::make_index_sequence<N>());
    for (size_t i = 0; i < N; ++i) {
        lanes[i] = Isa::load(runs[i]->state);
        active[i] = Isa::active_lanes(runs[i]->lanes);
        words[i] = runs[i]->words;
        models[i] = runs[i]->models;
    }
    const auto decode_step = [&](size_t i, size_t step) {
        return 2 * coder[i].step(lanes[i], active[i], tables, models[i][step], words[i], step);
    };

    // Too few words are noticed a few steps late: what lies behind them may be read, but the symbols
    // are void.
    for (size_t step = 0; step < steps;) {
        const size_t end = least(steps, step + kUncheckedSteps);
        for (; step < end; ++step) {
#pragma GCC unroll 8
            for (size_t i = 0; i < N; ++i) words[i] += decode_step(i, step);
        }
        bool starved = false;
        for (size_t i = 0; i < N; ++i) starved |= runs[i]->starved = words[i] > runs[i]->words_end;
        if (starved) return;
    }

    for (size_t i = 0; i < N; ++i) {
        // Idle lanes went through the motions; their states must stay.
        uint32_t state[kLanes];
        Isa::store(lanes[i], state);
        std::memcpy(runs[i]->state, state, sizeof state[0] * runs[i]->lanes);
        runs[i]->words = words[i];
        coder[i].finish(*runs[i], steps);
    }
}

// As many at a time as the registers hold, then half as many, and so on.
template <class Isa, class Coder, size_t N = Isa::kSideBySide>
void decode_groups(const typename Coder::Table* tables, DecodeRun* const* runs, size_t count,
                   size_t steps) {
    for (; count >= N; count -= N, runs += N)
        decode_side_by_side<Isa, Coder, N>(tables, runs, steps);
    if constexpr (N > 1) decode_groups<Isa, Coder, N / 2>(tables, runs, count, steps);
}

// Symbols by alias tables, with contexts if K is kContextBuckets; an Isa with
//     size_t decode_step<K>(Lanes&, Active, table, contexts, words, symbols)
template <class Isa, unsigned K>
struct AliasCoder {
    using Table = AliasTable;

    explicit AliasCoder(const DecodeRun& run) : contexts(run.contexts), symbols(run.symbols) {}

    [[gnu::always_inline]] size_t step(typename Isa::Lanes& x, typename Isa::Active active,
                                       const Table* tables, size_t model, const uint8_t* words,
                                       size_t step) {
        const uint8_t* context = K == kContextBuckets ? contexts + step * kLanes : nullptr;
        return Isa::template decode_step<K>(x, active, tables + model, context, words,
                                            symbols + step * kLanes);
    }
    void finish(DecodeRun&, size_t) const {}

    const uint8_t* contexts;
    uint8_t* symbols;
};

template <class Isa>
void decode_runs(const AliasTable* tables, unsigned buckets, DecodeRun* const* runs, size_t count,
                 size_t steps) {
    switch (buckets) {
        case kContextBuckets:
            return decode_groups<Isa, AliasCoder<Isa, kContextBuckets>>(tables, runs, count, steps);
        case 16: return decode_groups<Isa, AliasCoder<Isa, 16>>(tables, runs, count, steps);
        default: return decode_groups<Isa, AliasCoder<Isa, 32>>(tables, runs, count, steps);
    }
}

}  // namespace
}  // namespace cachegen
