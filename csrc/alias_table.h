// Models as alias tables (FORMAT.md, "Alias tables") and their inverses for the encoder.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "format.h"

namespace cachegen {

// 4096 slots in K = 4, 16 or 32 equal buckets. A bucket has two parts: its own, which comes first,
// and the other. Part b is the own part of bucket b, part b + K its other part.
// The arrays are whole vector registers, so that a SIMD kernel looks parts up by permutation.
struct alignas(64) AliasTable {
    uint16_t threshold[32];  // T[b]: first slot of the other part of bucket b, up to 4096
    uint16_t freq[64];       // F[i]: frequency of the symbol of part i
    uint16_t bias[64];       // B[i] modulo 2^16: rank of the part's first slot minus that slot
    uint8_t symbol[64];      // S[i]

    // The same once more for instruction sets that look up bytes only.
    uint8_t cut[32];  // size of the own part of a bucket; 255 for 256, see build_bytes
    uint8_t freq_low[64], freq_high[64];
    uint8_t bias_low[64], bias_high[64];
};
static_assert(sizeof(AliasTable) == 704);

// Finds the slot of (symbol, rank). Sort all slots by symbol, then by rank: the position of a slot
// is first[symbol] + rank, and every part is one run of positions. A part that is empty begins where
// the one behind it does, or at kTotal, as unused entries do; so a binary search for the last part
// that begins at or before a position needs no length and never finds it.
struct alignas(64) InverseTable {
    uint16_t freq[32];
    uint16_t first[32];
    uint16_t part_begin[64];  // ascending; [0] is 0
    uint16_t part_shift[64];  // slot minus position, modulo 2^16
    float reciprocal[32];     // a little less than 1 / freq, see below; 0 where freq is 0
};
static_assert(sizeof(InverseTable) == 512);

// The encoder divides states x < freq * 2^20. In float arithmetic three roundings, each by a factor
// of 1 +- 2^-24, lead to x * reciprocal. With this factor the product is never above x / freq, and
// less than 7 * 2^-24 * x / freq < 1/2 below it: cut to an integer it is the quotient or one less.
inline constexpr double kReciprocalFactor = 1 - 0x1p-22;

// The tables of `progressive` once more for its fused decoders, as whole registers (see
// docs/fused-decode.md). No frequency is 4096, so 16 times one fits 16 bits. Pass 0, K = 32:
struct alignas(64) CoarseTable {
    uint16_t threshold[32];   // T[b]
    uint16_t other[32];       // symbol of the other part; the own part of bucket b has symbol b
    uint16_t freq16[32];      // 16 F, by symbol
    uint16_t own_bias[32];    // B of the own parts
    uint16_t other_bias[32];  // B of the others
    int16_t value[32];        // by symbol: 0, -1, 1, -2, ...; kEscapedValue for the escape index
};
// Larger than any value of pass 0.
inline constexpr int16_t kEscapedValue = 0x4000;
// A later pass, both contexts: bucket b of a value that is zero, positive or negative so far is
// entry b, 4 + b or 28 + b (that is, b - 4), its other part 16 entries on, modulo 32.
struct alignas(64) RefineTable {
    uint16_t threshold[32], freq16[32], bias[32];
    uint16_t change[32];  // what the digit adds to three times the value, modulo 2^16
};

// For whoever has models that live no longer than a segment, and keeps the memory of their tables.
// freqs: rows of `alphabet` frequencies. Throws Error (Corrupt) unless each row sums to 4096.
void check_models(std::span<const uint16_t> freqs, size_t alphabet);
// tables: one for each row; of sound rows only.
void build_alias_tables(std::span<const uint16_t> freqs, size_t alphabet, unsigned buckets,
                        AliasTable* tables);
void build_inverse_tables(std::span<const uint16_t> freqs, size_t alphabet, unsigned buckets,
                          InverseTable* tables);

// The models of a segment. What it shows never changes, so threads may share one.
class Tables {
public:
    // freqs: count rows of `alphabet` frequencies; escapes: count escape indices or kNoEscape,
    // or empty. Throws Error (Corrupt): these may come from a received object.
    Tables(std::span<const uint16_t> freqs, std::span<const uint8_t> escapes, size_t count,
           size_t alphabet);

    size_t count() const { return escapes_.size(); }
    size_t alphabet() const { return alphabet_; }
    bool any_escape() const { return any_escape_; }
    bool any_certain() const { return any_certain_; }  // a frequency of 4096
    uint8_t escape(size_t model) const { return escapes_[model]; }

    // K of a segment without contexts; with them it is kContextBuckets.
    unsigned buckets() const { return alphabet_ <= 16 ? 16 : 32; }

    // The tables with K = buckets() or kContextBuckets, one per model, built by the first who asks:
    // a decoder never pays for the inverse, nor anybody for a K that is not used.
    const AliasTable* alias(unsigned buckets) const;
    const InverseTable* inverse(unsigned buckets) const;

    // For the fused decoders, if this is the table set of pass 0 (K = 32, all with an escape
    // index) or of later passes (pairs of models with 3 symbols), and not any_certain().
    const CoarseTable* coarse() const;
    const RefineTable* refine() const;

private:
    struct Built {
        std::once_flag alias_once, inverse_once;
        std::vector<AliasTable> alias;
        std::vector<InverseTable> inverse;
    };
    Built& built(unsigned buckets) const {
        return buckets == kContextBuckets ? with_contexts_ : plain_;
    }

    size_t alphabet_;
    bool any_escape_ = false, any_certain_ = false;
    std::vector<uint16_t> freqs_;  // rows of alphabet_
    std::vector<uint8_t> escapes_;
    mutable Built plain_, with_contexts_;
    mutable std::once_flag coarse_once_, refine_once_;
    mutable std::vector<CoarseTable> coarse_;
    mutable std::vector<RefineTable> refine_;
};

}  // namespace cachegen
