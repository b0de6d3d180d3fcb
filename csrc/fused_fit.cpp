// Classes of the channels by exact code lengths, and what errors every pass leaves.
#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <utility>

#include "dispatch.h"
#include "fused_encode.h"

namespace cachegen {
namespace {

constexpr int kClassCount = 64, kOffsetSteps = 12;
constexpr unsigned kZeroBin = 2;  // of a value that is 0: 4 * (0 + 1/2)
constexpr unsigned kApart = 4;
constexpr double kLateArea = 1.2 * 1.2;

// Sums over values of their places in cells, in quarters of the finest one.
struct Moments {
    uint64_t count = 0, sum = 0, squares = 0;

    void add(uint64_t times, uint64_t place) {
        count += times;
        sum += times * place;
        squares += times * place * place;
    }
    // Squared distances, in finest cells, from a point: values lie anywhere within their quarters.
    double error(double point) const {
        const auto n = static_cast<double>(count), first = static_cast<double>(sum);
        const double second = (static_cast<double>(squares) + first + n / 3) / 16;
        return second - 2 * point * ((first + n / 2) / 4) + n * (point * point);
    }
};

class GroupFit {
public:
    GroupFit(EncodeGroup& group, GroupDigits& digits, const EncodeSettings& settings)
        : group_(group),
          digits_(digits),
          settings_(settings),
          refinements_(settings.passes - 1),
          channels_(group.shape.channels),
          places_(group.shape.places()),
          counted_(kCoarseCounts + kRefineCounts * refinements_) {}

    void run() {
        group_.classes.assign(channels_, 0);
        digits_.most.assign(channels_, 0);
        choose_classes();
        measure_errors();
    }

private:
    // Counts of 15 bits: those of longer chunks lose their low bits.
    void count(size_t channel, uint16_t* counts) {
        uint32_t all[kMaxCounts];
        const size_t at = channel * kLanes;
        const uint8_t* const tally =
            digits_.tallies.empty() ? nullptr : &digits_.tallies[channel * kTally];
        kernels().encode_rows.count_channel(digits_.codes.data() + at,
                                            digits_.symbols.data() + at, tally, places_,
                                            channels_ * kLanes, refinements_, all);
        unsigned most = kCoarseCounts - 2;
        while (most && !all[most]) --most;
        digits_.most[channel] = static_cast<uint8_t>(most);
        const uint64_t tokens = group_.shape.tokens;
        const auto idle = static_cast<uint32_t>(places_ * kLanes - tokens);
        all[0] -= idle;
        for (unsigned pass = 0; pass < refinements_; ++pass)
            all[kCoarseCounts + kRefineCounts * pass + 1] -= idle;
        const int shift = std::max(0, static_cast<int>(std::bit_width(tokens)) - 15);
        for (unsigned i = 0; i < counted_; ++i) counts[i] = static_cast<uint16_t>(all[i] >> shift);
    }

    void choose_classes() {
        const LadderEncodeRows& kernel = kernels().encode_rows;
        const bool plain = group_.base_classes.empty();
        uint64_t by_offset[2 * kOffsetSteps + 1] = {};
        for (size_t c = 0; c < channels_; ++c) {
            uint16_t counts[kMaxCounts];
            uint32_t lengths[kWays];
            count(c, counts);
            const unsigned best = kernel.code_lengths(counts, settings_.costs, counted_, lengths);
            if (plain) {
                group_.classes[c] = static_cast<uint8_t>(best);
            } else {
                for (int offset = -kOffsetSteps; offset <= kOffsetSteps; ++offset)
                    by_offset[offset + kOffsetSteps] += lengths[shifted(c, offset)];
            }
        }
        if (plain) return;
        const auto best = std::min_element(std::begin(by_offset), std::end(by_offset));
        group_.class_offset = static_cast<int>(best - by_offset) - kOffsetSteps;
        for (size_t c = 0; c < channels_; ++c) group_.classes[c] = shifted(c, group_.class_offset);
    }

    uint8_t shifted(size_t channel, int offset) const {
        const int moved = std::clamp(group_.base_classes[channel] + offset, 0, kClassCount - 1);
        return static_cast<uint8_t>(group_.families[channel] * kClassCount + moved);
    }

    // The bins of all measured values by class, without idle and exempt tokens.
    std::vector<uint32_t> histograms(size_t& measured) const {
        const unsigned bins = kBins(refinements_);
        std::vector<uint32_t> all(kClassCount * bins);
        // Neighbours often are in one bin: counted apart, so that they do not wait for each other.
        std::vector<uint32_t> apart(kApart * bins);
        const TokenRows tokens(group_.shape);
        const auto keep = tokens.keep(group_.exempt);
        measured = 0;
        for (size_t place = 0; place < places_; place += kErrorPlaces)
            measured += static_cast<size_t>(std::count(&keep[place * kLanes],
                                                       &keep[place * kLanes] + kLanes,
                                                       ~uint32_t{0}));
        const size_t rows = ceil_div(places_, kErrorPlaces);
        const auto class_of = [&](size_t c) { return group_.classes[c] % kClassCount; };
        std::vector<size_t> order(channels_), ends(kClassCount + 1);  // of channels by class
        for (size_t c = 0; c < channels_; ++c) ++ends[static_cast<size_t>(class_of(c)) + 1];
        std::partial_sum(ends.begin(), ends.end(), ends.begin());
        for (size_t c = 0; c < channels_; ++c) order[ends[static_cast<size_t>(class_of(c))]++] = c;
        for (size_t first = 0, end; first < channels_; first = end) {
            const int k = class_of(order[first]);
            for (end = first; end < channels_ && class_of(order[end]) == k; ++end)
                for (size_t row = 0; row < rows; ++row)
                    add_row(&digits_.bins[(row * channels_ + order[end]) * kLanes], apart.data());
            uint32_t* const of = &all[static_cast<size_t>(k) * bins];
            for (unsigned way = 0; way < kApart; ++way)
                for (unsigned bin = 0; bin < bins; ++bin)
                    of[bin] += std::exchange(apart[way * bins + bin], 0);
            of[kZeroBin] -= static_cast<uint32_t>((end - first) * (rows * kLanes - measured));
        }
        return all;
    }

    void add_row(const uint16_t* row, uint32_t* apart) const {
        const unsigned bins = kBins(refinements_);
        for (unsigned e = 0; e < kLanes; e += kApart)
            for (unsigned way = 0; way < kApart; ++way) ++apart[way * bins + row[e + way]];
    }

    void measure_errors() {
        for (auto& way : group_.errors) way.fill(0);
        size_t measured = 0;
        const std::vector<uint32_t> all = histograms(measured);
        if (!measured) return;
        for (int k = 0; k < kClassCount; ++k) {
            const uint32_t* const bins = &all[static_cast<size_t>(k) * kBins(refinements_)];
            if (std::any_of(bins, bins + kBins(refinements_), [](uint32_t n) { return n; }))
                for (unsigned pass = 0; pass <= refinements_; ++pass) add_class(k, pass, bins);
        }
        const auto tokens = static_cast<double>(group_.shape.tokens - group_.exempt.size());
        for (auto& way : group_.errors)
            for (double& error : way) error *= tokens / static_cast<double>(measured);
    }

    void add_class(int k, unsigned pass, const uint32_t* bins) {
        const auto step = static_cast<unsigned>(power_of_three(refinements_ - pass));
        const unsigned half = static_cast<unsigned>(most_late(refinements_));
        Moments zero, late, early;
        for (unsigned bin = 0; bin < kLateBins(refinements_); ++bin) {
            const unsigned size = bin / 4;
            if (!bins[bin]) continue;
            if (2 * size > step) late.add(bins[bin], 4 * ((size + half) % step) + bin % 4);
            else zero.add(bins[bin], bin - kZeroBin);
        }
        for (unsigned bin = 0; bin < 4 * static_cast<unsigned>(power_of_three(refinements_)); ++bin)
            if (const uint32_t n = bins[kLateBins(refinements_) + bin])
                early.add(n, 4 * (bin / 4 % step) + bin % 4);
        for (unsigned decay = 0; decay < kDecays; ++decay) {
            const double* const share =
                settings_.centroids + (decay * settings_.passes + pass) * 2 * kClassCount + k;
            const double width = step;
            group_.errors[decay][pass] +=
                early.error(share[0] * width) +
                kLateArea * (late.error(share[kClassCount] * width) + zero.error(0));
        }
    }

    EncodeGroup& group_;
    GroupDigits& digits_;
    const EncodeSettings& settings_;
    unsigned refinements_;
    size_t channels_, places_;
    unsigned counted_;
};

}  // namespace

void fit_group(EncodeGroup& group, GroupDigits& digits, const EncodeSettings& settings) {
    GroupFit(group, digits, settings).run();
}

}  // namespace cachegen
