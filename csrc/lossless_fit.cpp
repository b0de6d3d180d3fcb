#include "lossless_fit.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "channel_models.h"
#include "dispatch.h"

namespace cachegen {
namespace {

constexpr size_t kSize = kMaxAlphabet;
constexpr size_t kUnits = 128;  // runs of channels, for the search
constexpr int kRounds = 4, kLastRounds = 2;
constexpr int64_t kBit = 1024;  // of costs
// Counts of the kernel are 16 bits, and sums of so many costs 32.
constexpr uint64_t kMostCounted = 32767;

void add_row(const uint32_t* __restrict counts, uint32_t* __restrict sums) {
    for (size_t v = 0; v < kSize; ++v) sums[v] += counts[v];
}

// Rows of counts, each of a channel or of a run of them, and the classes they are in.
class Clustering {
public:
    Clustering(std::span<const uint32_t> counts, const LosslessCosts& costs)
        : counts_(counts), costs_(costs), everywhere_(kSize), classes_(counts.size() / kSize) {
        uint64_t most = 0;
        for (size_t at = 0; at < counts.size(); at += kSize) {
            uint64_t sum = 0;
            for (size_t v = 0; v < kSize; ++v) {
                everywhere_[v] += counts[at + v];
                sum += counts[at + v];
            }
            most = std::max(most, sum);
        }
        if (most <= kMostCounted) narrow_.assign(counts.begin(), counts.end());
    }

    std::vector<uint8_t>& classes() { return classes_; }
    std::vector<uint16_t>& freqs() { return freqs_; }

    // One table for each class, in which every symbol of the plane can be coded.
    void find_tables(size_t number) {
        std::vector<uint32_t> sums(number * kSize);
        for (size_t row = 0; row < classes_.size(); ++row)
            add_row(&counts_[row * kSize], &sums[classes_[row] * kSize]);
        for (size_t i = 0; i < sums.size(); ++i) sums[i] = everywhere_[i % kSize] ? sums[i] + 1 : 0;
        freqs_.resize(sums.size());
        normalize_counts(sums, kSize, costs_.bits_saved, freqs_.data());
    }

    void choose_classes() {
        const size_t number = freqs_.size() / kSize;
        std::vector<int16_t> costs(freqs_.size());  // as best_class takes them
        for (size_t n = 0; n < number; ++n)
            for (size_t v = 0; v < kSize; ++v)
                costs[2 * (v / 2 * number + n) + v % 2] = costs_.costs[freqs_[n * kSize + v]];
        if (narrow_.empty()) {
            for (size_t row = 0; row < classes_.size(); ++row) {
                int64_t bits[kMostLosslessTables];
                for (size_t n = 0; n < number; ++n) bits[n] = bits_of(row, n);
                classes_[row] = static_cast<uint8_t>(std::min_element(bits, bits + number) - bits);
            }
            return;
        }
        // The kernel takes as many rows of counts at a time as there are rotations elsewhere.
        for (size_t begin = 0; begin < classes_.size(); begin += kRotations) {
            const uint16_t* rows[kRotations];
            for (size_t i = 0; i < kRotations; ++i)
                rows[i] = &narrow_[std::min(begin + i, classes_.size() - 1) * kSize];
            uint32_t bits[kRotations * kMostLosslessTables];
            kernels().symbol_rows.best_class(rows, costs.data(), number, bits);
            for (size_t i = 0; i < kRotations && begin + i < classes_.size(); ++i) {
                const uint32_t* const own = bits + i * number;
                classes_[begin + i] =
                    static_cast<uint8_t>(std::min_element(own, own + number) - own);
            }
        }
    }

    int64_t bits() const {
        int64_t sum = kBit * 16 * static_cast<int64_t>(freqs_.size());
        for (size_t row = 0; row < classes_.size(); ++row) sum += bits_of(row, classes_[row]);
        return sum;
    }

private:
    int64_t bits_of(size_t row, size_t table) const {
        int64_t sum = 0;
        for (size_t v = 0; v < kSize; ++v)
            sum += int64_t{counts_[row * kSize + v]} * costs_.costs[freqs_[table * kSize + v]];
        return sum;
    }

    std::span<const uint32_t> counts_;
    const LosslessCosts& costs_;
    std::vector<uint16_t> narrow_;  // counts_ again, if they fit
    std::vector<uint64_t> everywhere_;
    std::vector<uint8_t> classes_;
    std::vector<uint16_t> freqs_;
};

// Channels from narrow to wide: by how far symbols lie from the top, in the mean.
std::vector<size_t> order_of(std::span<const uint32_t> counts) {
    std::vector<uint64_t> spread(counts.size() / kSize);
    for (size_t c = 0; c < spread.size(); ++c)
        for (uint32_t v = 0; v < kSize; ++v) spread[c] += uint64_t{v} * counts[c * kSize + v];
    std::vector<size_t> order(spread.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return spread[a] < spread[b]; });
    return order;
}

}  // namespace

// The search is among runs of neighbours in that order: a channel of its own has few symbols, and
// there are many. Only in the end each chooses for itself.
LosslessFit fit_lossless(std::span<const uint32_t> counts, const LosslessCosts& costs) {
    const std::vector<size_t> order = order_of(counts);
    const size_t channels = order.size(), units = std::min(kUnits, channels);
    std::vector<uint32_t> joined(units * kSize);
    for (size_t i = 0; i < channels; ++i)
        add_row(&counts[order[i] * kSize], &joined[i * units / channels * kSize]);
    Clustering search(joined, costs);
    int64_t least = std::numeric_limits<int64_t>::max();
    std::vector<uint16_t> best;
    for (size_t number = 1; number <= std::min<size_t>(kMostLosslessTables, channels); number *= 2) {
        for (size_t unit = 0; unit < units; ++unit)
            search.classes()[unit] = static_cast<uint8_t>(unit * number / units);
        search.find_tables(number);
        for (int round = 0; number > 1 && round < kRounds; ++round) {
            search.choose_classes();
            search.find_tables(number);
        }
        const int64_t bits = search.bits();
        if (bits >= least) continue;
        least = bits;
        best = search.freqs();
    }
    Clustering last(counts, costs);
    last.freqs() = std::move(best);
    const size_t number = last.freqs().size() / kSize;
    for (int round = 0; number > 1 && round < kLastRounds; ++round) {
        last.choose_classes();
        last.find_tables(number);
    }
    return {std::move(last.freqs()), std::move(last.classes())};
}

}  // namespace cachegen
