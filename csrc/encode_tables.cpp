#include "encode_tables.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"

namespace cachegen {
namespace {

// Runs of positions (first[symbol] + rank) whose slots follow one another. Where the own part of a
// bucket ends and the next bucket continues its symbol, two parts of the table are one run.
struct Runs {
    uint16_t begin[64], shift[64];
    unsigned count = 0;

    explicit Runs(const InverseTable& table) {
        for (unsigned part = 0; part < 64 && table.part_begin[part] < kTotal; ++part) {
            if (part < 63 && table.part_begin[part + 1] == table.part_begin[part]) continue;  // empty
            if (count && shift[count - 1] == table.part_shift[part]) continue;
            begin[count] = table.part_begin[part];
            shift[count++] = table.part_shift[part];
        }
    }
};

uint8_t rounds_for(const CoarseEncodeTable& table, unsigned runs) {
    // With 3 rounds a kernel looks at the first 16 symbols only.
    const bool few_symbols =
        std::all_of(table.freq + 16, table.freq + 32, [](uint16_t freq) { return freq == 0; });
    return runs <= 8 && few_symbols ? 3 : runs <= 32 ? 5 : 6;
}

void repeat_entries(RefineEncodeTable& table) {
    const auto repeat = [](auto& entries) {
        for (size_t i = 8; i < std::size(entries); ++i) entries[i] = entries[i % 8];
    };
    repeat(table.freq);
    repeat(table.base);
    for (unsigned i = 0; i < 2; ++i) {
        repeat(table.bound[i]);
        repeat(table.more[i]);
    }
    repeat(table.reciprocal);
}

// One context of a model. A symbol has at most three runs: it can have a part in each of the four
// buckets, but the last bucket is nobody's own, so what it holds continues the end of the third.
void fill_context(const InverseTable& from, RefineEncodeTable& table, unsigned context) {
    const Runs runs(from);
    for (unsigned symbol = 0; symbol < 3; ++symbol) {
        const unsigned entry = 4 * context + symbol;
        const unsigned first = from.first[symbol], end = first + from.freq[symbol];
        table.freq[entry] = from.freq[symbol];
        table.reciprocal[entry] = from.reciprocal[symbol];
        unsigned run = 0;
        while (run + 1 < runs.count && runs.begin[run + 1] <= first) ++run;
        table.base[entry] = static_cast<uint16_t>(first + runs.shift[run]);
        for (unsigned i = 0; i < 2; ++i) {
            const bool more = run + 1 < runs.count && runs.begin[run + 1] < end;
            table.bound[i][entry] = static_cast<uint16_t>(more ? runs.begin[run + 1] - first : 0xffff);
            table.more[i][entry] =
                static_cast<uint16_t>(more ? runs.shift[run + 1] - runs.shift[run] : 0);
            run += more;
        }
        if (run + 1 < runs.count && runs.begin[run + 1] < end)
            throw std::logic_error("a symbol of three has more than three runs of slots");
    }
}

}  // namespace

EncodeTables::EncodeTables(const Tables& coarse, const Tables& refine)
    : coarse_(coarse.count()), refine_(coarse.count()) {
    if (coarse.buckets() != 32 || refine.alphabet() != 3 || refine.count() != 2 * coarse.count() ||
        coarse.any_certain() || refine.any_certain())
        throw Error(ErrorKind::Config, "tables of the ladder", "others", "frozen ones");
    const InverseTable* const inverse = coarse.inverse(32);
    const InverseTable* const contexts = refine.inverse(kContextBuckets);
    for (size_t row = 0; row < coarse_.size(); ++row) {
        const Runs runs(inverse[row]);
        CoarseEncodeTable& table = coarse_[row];
        std::copy_n(inverse[row].freq, 32, table.freq);
        std::copy_n(inverse[row].first, 32, table.first);
        std::copy_n(inverse[row].reciprocal, 32, table.reciprocal);
        std::fill_n(table.begin, 64, uint16_t{kTotal});
        std::fill_n(table.shift, 64, uint16_t{0});
        std::copy_n(runs.begin, runs.count, table.begin);
        std::copy_n(runs.shift, runs.count, table.shift);
        rounds_.push_back(rounds_for(table, runs.count));
        escapes_.push_back(coarse.escape(row));
        refine_[row] = {};
        for (unsigned context = 0; context < 2; ++context)
            fill_context(contexts[2 * row + context], refine_[row], context);
        repeat_entries(refine_[row]);
    }
}

}  // namespace cachegen
