// Portable kernels. They are the fallback of every machine and the pattern for the SIMD ones.
#include <array>
#include <bit>
#include <cstring>

#include "block_portable.h"
#include "dispatch.h"
#include "ladder_rows.h"
#include "encode_rows.h"
#include "lossless_rows.h"
#include "quantize_rows.h"
#include "symbol_rows.h"

namespace cachegen {
namespace {

// ---- Decoding ----------------------------------------------------------------------------------

template <unsigned K>
inline uint32_t decode_symbol(const AliasTable& table, uint32_t state, uint8_t& symbol) {
    constexpr unsigned width_bits = kProbBits - std::countr_zero(K);
    const uint32_t slot = state & (kTotal - 1);
    const uint32_t bucket = slot >> width_bits;
    const uint32_t part = bucket + K * (slot >= table.threshold[bucket]);
    symbol = table.symbol[part];
    // slot + bias is the rank of the slot; the bias is negative modulo 2^16.
    const auto rank = static_cast<uint16_t>(slot + table.bias[part]);
    return table.freq[part] * (state >> kProbBits) + rank;
}

inline uint32_t load_word(const uint8_t* at) {
    uint16_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
}

// The table of a lane: with contexts (K = 4) there are two for each step, one behind the other.
template <unsigned K, class Table>
inline const Table& table_of(const Table* tables, const uint8_t* contexts, size_t i) {
    if constexpr (K == kContextBuckets) return tables[contexts[i]];
    return *tables;
}

template <unsigned K>
void decode_run(const AliasTable* tables, DecodeRun& run, size_t steps) {
    const unsigned lanes = run.lanes;
    const uint8_t* const contexts = run.contexts;
    const uint8_t* words = run.words;
    for (size_t step = 0; step < steps; ++step) {
        const AliasTable* const models = tables + run.models[step];
        uint8_t* symbols = run.symbols + step * kLanes;
        // The word is loaded whether needed or not: a branch here would be mispredicted all the time.
        for (unsigned lane = 0; lane < lanes; ++lane) {
            const AliasTable& table = table_of<K>(models, contexts, step * kLanes + lane);
            const uint32_t state = decode_symbol<K>(table, run.state[lane], symbols[lane]);
            const bool refill = state < kStateMin;
            const uint32_t refilled = state << 16 | load_word(words);
            run.state[lane] = refill ? refilled : state;
            words += refill ? 2 : 0;
        }
        if (words > run.words_end) {
            run.starved = true;
            return;
        }
    }
    run.words = words;
}

void decode_runs(const AliasTable* tables, unsigned buckets, DecodeRun* const* runs, size_t count,
                 size_t steps) {
    // 32 lanes keep a scalar core busy; interleaving the runs would gain nothing.
    for (size_t i = 0; i < count; ++i) {
        switch (buckets) {
            case kContextBuckets: decode_run<kContextBuckets>(tables, *runs[i], steps); break;
            case 16: decode_run<16>(tables, *runs[i], steps); break;
            default: decode_run<32>(tables, *runs[i], steps);
        }
    }
}

// ---- Encoding ----------------------------------------------------------------------------------

// ceil(2^44 / f). For x < f * 2^20, which is what the encoder divides, (x * reciprocal) >> 44 is
// exactly x / f: the product fits 64 bits, and it is too large by less than x / 2^44 < 1 / f.
constexpr unsigned kReciprocalBits = 44;
constexpr auto kReciprocals = [] {
    std::array<uint64_t, kTotal + 1> table{};
    for (uint64_t f = 1; f <= kTotal; ++f)
        table[f] = ((uint64_t{1} << kReciprocalBits) + f - 1) / f;
    return table;
}();

template <unsigned K>
inline uint32_t slot_of(const InverseTable& table, uint32_t position) {
    // Binary search for the last part that begins at or before the position. Sums and not choices,
    // because compilers turn a choice into a branch.
    unsigned part = 0;
    for (unsigned half = K; half; half /= 2)
        part += half * (table.part_begin[part + half] <= position);
    return static_cast<uint16_t>(position + table.part_shift[part]);
}

template <unsigned K>
void encode_run_k(const InverseTable* tables, EncodeRun& run, size_t steps) {
    uint16_t* words = run.words;
    const uint8_t* const contexts = run.contexts;
    bool uncodable = false;
    for (size_t step = steps; step-- > 0;) {
        const InverseTable* const models = tables + run.models[step];
        const uint8_t* symbols = run.symbols + step * kLanes;
        for (unsigned lane = run.lanes; lane-- > 0;) {
            const InverseTable& table = table_of<K>(models, contexts, step * kLanes + lane);
            uint32_t state = run.state[lane];
            const unsigned symbol = symbols[lane];
            const uint32_t freq = table.freq[symbol];
            uncodable |= freq == 0;
            // The word is written always and kept only if the pointer moves; the shift is by 0
            // or 16. A branch here would be mispredicted all the time.
            const unsigned spill = state >= uint64_t{freq} << 20;
            words[-1] = static_cast<uint16_t>(state);
            words -= spill;
            state >>= 16 * spill;
            const auto quotient =
                static_cast<uint32_t>(state * kReciprocals[freq] >> kReciprocalBits);
            const uint32_t rank = state - quotient * freq;
            const uint32_t slot = slot_of<K>(table, table.first[symbol] + rank);
            run.state[lane] = quotient << kProbBits | slot;
        }
    }
    run.words = words;
    run.uncodable |= uncodable;
}

}  // namespace

void encode_runs_scalar(const InverseTable* tables, unsigned buckets, EncodeRun* const* runs,
                        size_t count, size_t steps) {
    for (size_t i = 0; i < count; ++i) {
        switch (buckets) {
            case kContextBuckets: encode_run_k<kContextBuckets>(tables, *runs[i], steps); break;
            case 16: encode_run_k<16>(tables, *runs[i], steps); break;
            default: encode_run_k<32>(tables, *runs[i], steps);
        }
    }
}

constinit const Kernels kScalarKernels = {
    .isa = "scalar",
    .is_available = [] { return true; },
    .decode_runs = decode_runs,
    .encode_runs = encode_runs_scalar,
    .build_alias = nullptr,
    .build_inverse = nullptr,
    .scatter = scatter,
    .gather = gather,
    .decode_coarse = nullptr,
    .decode_refine = nullptr,
    .find_bytes = find_bytes,
    .coarse_values = coarse_values,
    .value_contexts = value_contexts,
    .refine_values = refine_values,
    .finish_unit = {finish_unit<KVType::Float16>, finish_unit<KVType::BFloat16>,
                    finish_unit<KVType::Float32>},
    .fill_lookup = {},
    .turn_means = {turn_means<KVType::Float16>, turn_means<KVType::BFloat16>,
                   turn_means<KVType::Float32>},
    .scale_rows = scale_rows,
    .finish_row = {finish_row<KVType::Float16>, finish_row<KVType::BFloat16>,
                   finish_row<KVType::Float32>},
    .encode_rows = encode_rows(),
    .angle_lanes = kLanesInOrder,
    .per_type = {row_kernels<KVType::Float16>(), row_kernels<KVType::BFloat16>(),
                 row_kernels<KVType::Float32>()},
    .symbol_rows = symbol_rows(),
    .lossless_rows = {lossless_rows<KVType::Float16>(), lossless_rows<KVType::BFloat16>(),
                      lossless_rows<KVType::Float32>()},
};

}  // namespace cachegen
