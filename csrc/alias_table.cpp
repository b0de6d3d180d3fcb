#include "alias_table.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "float_bits.h"

namespace cachegen {
namespace {

[[noreturn]] void refuse(size_t model, const char* what, unsigned got, std::string expected) {
    throw Error(ErrorKind::Corrupt, what + (" of model " + std::to_string(model)),
                std::to_string(got), std::move(expected));
}

void check_model(std::span<const uint16_t> freqs, uint8_t escape, size_t model) {
    // A sum of 4096 also bounds each frequency, and 32 of 16 bits cannot overflow.
    const unsigned sum = std::accumulate(freqs.begin(), freqs.end(), 0u);
    if (sum != kTotal) refuse(model, "sum of the frequencies", sum, "4096");
    if (escape == kNoEscape) return;
    if (escape == 0 || escape >= freqs.size())
        refuse(model, "escape index", escape, "1 to " + std::to_string(freqs.size() - 1));
    // Behind the escape index no symbol can stand: its value has an escape code already, and two
    // codes for one value would give one matrix two bodies.
    for (size_t s = escape + 1u; s < freqs.size(); ++s)
        if (freqs[s]) refuse(model, "frequency behind the escape index", freqs[s], "0");
}

// Shares the 4096 slots out to K buckets of two symbols at most. `freqs` is zero-padded to one
// frequency per bucket. Every bucket gets its cut (size of its own part) and other symbol.
//
// Buckets that are too small are filled up from one large symbol until less than a bucket of it is
// left; then its own bucket is the next to be filled, from the large symbol after it. (That is the
// stack of FORMAT.md: what was pushed last is taken first.) So at any time there is one symbol that
// gives, and whichever way a step goes, what is left of the one that gives next is the sum of both
// less a bucket. No branch depends on the data: the order of frequencies is anything but predictable.
template <unsigned K>
void share_out(const uint16_t* freqs, uint16_t* cut, uint8_t* other) {
    constexpr uint32_t width = kTotal / K;
    // In ascending order and taken from the end; the order is part of the format.
    uint8_t small[K + 1], large[K + 1];
    uint32_t small_size = 0, large_size = 0;
    for (uint32_t s = 0; s < K; ++s) {
        const uint32_t is_small = freqs[s] < width;
        small[small_size] = large[large_size] = static_cast<uint8_t>(s);
        small_size += is_small;
        large_size += 1 - is_small;
    }
    // The open buckets have `width` slots each on average, so beside a small one is a large one.
    uint32_t giver = large[--large_size], left = freqs[giver];
    while (true) {
        const uint32_t is_next = left < width;
        if (small_size + is_next == 0) break;
        small_size -= 1 - is_next;
        large_size -= is_next;
        const uint32_t taken = select(is_next, large[large_size], small[small_size]);
        const uint32_t freq = freqs[taken];
        const uint32_t filled = select(is_next, giver, taken);
        cut[filled] = static_cast<uint16_t>(select(is_next, left, freq));
        giver = select(is_next, taken, giver);
        other[filled] = static_cast<uint8_t>(giver);
        left += freq - width;
    }
    for (large[large_size++] = static_cast<uint8_t>(giver); large_size;) {
        const uint32_t whole = large[--large_size];
        cut[whole] = static_cast<uint16_t>(width);
        other[whole] = static_cast<uint8_t>(whole);
    }
}

template <unsigned K>
void build_alias(const uint16_t* freqs, AliasTable& table) {
    constexpr unsigned width = kTotal / K;
    uint16_t cut[K];
    uint8_t other[K];
    share_out<K>(freqs, cut, other);
    uint16_t rank[K] = {};  // of the next slot of each symbol, in ascending slot order
    for (unsigned b = 0; b < K; ++b) {
        const unsigned begin = b * width, middle = begin + cut[b], end = begin + width;
        table.threshold[b] = static_cast<uint16_t>(middle);
        const auto fill = [&](unsigned part, unsigned symbol, unsigned from, unsigned to) {
            table.symbol[part] = static_cast<uint8_t>(symbol);
            table.freq[part] = freqs[symbol];
            table.bias[part] = static_cast<uint16_t>(rank[symbol] - from);
            rank[symbol] = static_cast<uint16_t>(rank[symbol] + (to - from));
        };
        fill(b, b, begin, middle);
        fill(b + K, other[b], middle, end);
    }
}

template <unsigned K>
void build_bytes(AliasTable& table) {
    constexpr unsigned width = kTotal / K;
    for (unsigned b = 0; b < K; ++b) {
        // With 16 buckets an own part may be the whole bucket, 256 slots. Its last slot can go to
        // the other part: where that is empty it is of the same symbol and has the same bias.
        const unsigned cut = table.threshold[b] - b * width;
        table.cut[b] = static_cast<uint8_t>(std::min(cut, 255u));
    }
    for (unsigned i = 0; i < 2 * K; ++i) table.freq_low[i] = static_cast<uint8_t>(table.freq[i]);
    for (unsigned i = 0; i < 2 * K; ++i)
        table.freq_high[i] = static_cast<uint8_t>(table.freq[i] >> 8);
    for (unsigned i = 0; i < 2 * K; ++i) table.bias_low[i] = static_cast<uint8_t>(table.bias[i]);
    for (unsigned i = 0; i < 2 * K; ++i)
        table.bias_high[i] = static_cast<uint8_t>(table.bias[i] >> 8);
}

template <unsigned K>
void build_all(std::span<const uint16_t> freqs, size_t alphabet, AliasTable* tables) {
    uint16_t row[kMaxAlphabet] = {};
    for (size_t n = 0; n < freqs.size() / alphabet; ++n) {
        std::copy_n(&freqs[n * alphabet], alphabet, row);
        build_alias<K>(row, tables[n]);
        if (K != kContextBuckets) build_bytes<K>(tables[n]);
    }
}

constexpr auto kReciprocals = [] {
    std::array<float, kTotal + 1> table{};
    for (unsigned f = 1; f <= kTotal; ++f) table[f] = static_cast<float>(kReciprocalFactor / f);
    return table;
}();

void build_inverse(const AliasTable& alias, unsigned buckets, InverseTable& inverse) {
    const unsigned width = kTotal / buckets;
    std::fill(std::begin(inverse.freq), std::end(inverse.freq), uint16_t{0});
    std::fill(std::begin(inverse.reciprocal), std::end(inverse.reciprocal), 0.0f);
    for (unsigned b = 0; b < buckets; ++b) {
        inverse.freq[b] = alias.freq[b];
        inverse.reciprocal[b] = kReciprocals[alias.freq[b]];
    }
    std::exclusive_scan(std::begin(inverse.freq), std::end(inverse.freq), std::begin(inverse.first),
                        uint16_t{0});

    // Counting sort of the parts by symbol; in slot order they already ascend in rank.
    uint8_t next[33] = {};  // index in part_begin of the next part of each symbol
    const auto for_each_part = [&](auto&& use) {
        for (unsigned b = 0; b < buckets; ++b) {
            const unsigned begin = b * width, middle = alias.threshold[b], end = begin + width;
            if (begin < middle) use(b, begin);
            if (middle < end) use(b + buckets, middle);
        }
    };
    for_each_part([&](unsigned part, unsigned) { ++next[alias.symbol[part] + 1]; });
    std::partial_sum(std::begin(next), std::end(next), std::begin(next));
    std::fill(std::begin(inverse.part_begin), std::end(inverse.part_begin), uint16_t{kTotal});
    std::fill(std::begin(inverse.part_shift), std::end(inverse.part_shift), uint16_t{0});
    for_each_part([&](unsigned part, unsigned slot) {
        const unsigned symbol = alias.symbol[part], index = next[symbol]++;
        const auto rank = static_cast<uint16_t>(slot + alias.bias[part]);
        inverse.part_begin[index] = static_cast<uint16_t>(inverse.first[symbol] + rank);
        inverse.part_shift[index] = static_cast<uint16_t>(slot - inverse.part_begin[index]);
    });
}

// Without tables for decoders, which an encoder does not need.
template <unsigned K>
void build_inverses(std::span<const uint16_t> freqs, size_t alphabet, InverseTable* inverses) {
    uint16_t row[kMaxAlphabet] = {};
    AliasTable alias;
    for (size_t n = 0; n < freqs.size() / alphabet; ++n) {
        std::copy_n(&freqs[n * alphabet], alphabet, row);
        build_alias<K>(row, alias);
        build_inverse(alias, K, inverses[n]);
    }
}

}  // namespace

void check_models(std::span<const uint16_t> freqs, size_t alphabet) {
    for (size_t n = 0; n < freqs.size() / alphabet; ++n)
        check_model(freqs.subspan(n * alphabet, alphabet), kNoEscape, n);
}

void build_alias_tables(std::span<const uint16_t> freqs, size_t alphabet, unsigned buckets,
                        AliasTable* tables) {
    const auto quick = kernels().build_alias;
    if (quick && buckets != kContextBuckets)
        return quick(freqs.data(), alphabet, freqs.size() / alphabet, buckets, tables);
    switch (buckets) {
        case kContextBuckets: return build_all<kContextBuckets>(freqs, alphabet, tables);
        case 16: return build_all<16>(freqs, alphabet, tables);
        default: return build_all<32>(freqs, alphabet, tables);
    }
}

void build_inverse_tables(std::span<const uint16_t> freqs, size_t alphabet, unsigned buckets,
                          InverseTable* tables) {
    const auto quick = kernels().build_inverse;
    if (quick && buckets != kContextBuckets)
        return quick(freqs.data(), alphabet, freqs.size() / alphabet, buckets, kReciprocals.data(),
                     tables);
    switch (buckets) {
        case kContextBuckets:
            return build_inverses<kContextBuckets>(freqs, alphabet, tables);
        case 16: return build_inverses<16>(freqs, alphabet, tables);
        default: return build_inverses<32>(freqs, alphabet, tables);
    }
}

Tables::Tables(std::span<const uint16_t> freqs, std::span<const uint8_t> escapes, size_t count,
               size_t alphabet)
    : alphabet_(alphabet), freqs_(freqs.begin(), freqs.end()), escapes_(count, kNoEscape) {
    if (alphabet < 2 || alphabet > kMaxAlphabet)
        throw Error(ErrorKind::Corrupt, "alphabet of the models", std::to_string(alphabet),
                    "2 to 32");
    std::copy(escapes.begin(), escapes.end(), escapes_.begin());
    for (size_t n = 0; n < count; ++n) {
        check_model(freqs.subspan(n * alphabet, alphabet), escapes_[n], n);
        any_escape_ |= escapes_[n] != kNoEscape;
    }
    any_certain_ = std::find(freqs_.begin(), freqs_.end(), kTotal) != freqs_.end();
}

const AliasTable* Tables::alias(unsigned buckets) const {
    Built& all = built(buckets);
    std::call_once(all.alias_once, [&] {
        std::vector<AliasTable> tables(count());
        build_alias_tables(freqs_, alphabet_, buckets, tables.data());
        all.alias = std::move(tables);
    });
    return all.alias.data();
}

const InverseTable* Tables::inverse(unsigned buckets) const {
    Built& all = built(buckets);
    std::call_once(all.inverse_once, [&] {
        std::vector<InverseTable> inverses(count());
        build_inverse_tables(freqs_, alphabet_, buckets, inverses.data());
        all.inverse = std::move(inverses);
    });
    return all.inverse.data();
}

const CoarseTable* Tables::coarse() const {
    std::call_once(coarse_once_, [&] {
        const AliasTable* const tables = alias(32);
        std::vector<CoarseTable> all(count());
        for (size_t n = 0; n < count(); ++n) {
            for (unsigned b = 0; b < 32; ++b) {
                all[n].threshold[b] = tables[n].threshold[b];
                all[n].other[b] = tables[n].symbol[b + 32];
                all[n].own_bias[b] = tables[n].bias[b];
                all[n].other_bias[b] = tables[n].bias[b + 32];
                all[n].freq16[b] = static_cast<uint16_t>(16 * tables[n].freq[b]);
                const int magnitude = static_cast<int>(b + 1) / 2;
                all[n].value[b] = b == escapes_[n] ? kEscapedValue
                                                   : static_cast<int16_t>(b % 2 ? -magnitude : magnitude);
            }
        }
        coarse_ = std::move(all);
    });
    return coarse_.data();
}

const RefineTable* Tables::refine() const {
    std::call_once(refine_once_, [&] {
        const AliasTable* const tables = alias(kContextBuckets);
        std::vector<RefineTable> all(count() / 2);
        for (size_t n = 0; n < all.size(); ++n) {
            for (int sign = -1; sign <= 1; ++sign) {
                const AliasTable& from = tables[2 * n + (sign != 0)];
                for (unsigned part = 0; part < 2 * kContextBuckets; ++part) {
                    const unsigned bucket = part % kContextBuckets;
                    const bool is_other = part >= kContextBuckets;
                    const auto at = (static_cast<unsigned>(4 * sign) + bucket + 16 * is_other) % 32;
                    if (!is_other) all[n].threshold[at] = from.threshold[bucket];
                    all[n].freq16[at] = static_cast<uint16_t>(16 * from.freq[part]);
                    all[n].bias[at] = from.bias[part];
                    const int digit = from.symbol[part];
                    all[n].change[at] =
                        static_cast<uint16_t>(sign == 0 ? digit - 1 : sign * digit);
                }
            }
        }
        refine_ = std::move(all);
    });
    return refine_.data();
}

}  // namespace cachegen
