// The first pass over the input: means, energy and tokens that are exempt.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "crew.h"
#include "dispatch.h"
#include "fused_encode.h"

namespace cachegen {
namespace {

// Below so many tokens a mean is dearer than what it saves, and no norm is out of the ordinary.
constexpr size_t kFewTokens = 8;
constexpr int kMeanLevels = 127;
// Tokens beyond so many median norms are stored exactly.
constexpr double kOutlierNorm = 3;
// Outliers move the centre from which the norms of others are taken: look again, so many times.
constexpr int kOutlierRounds = 4;
constexpr uint32_t kLargestBits = (127u + 100) << 23;  // 2^100
constexpr uint32_t kHugeBits = (127u + 50) << 23;      // squares beyond do not sum in a float

// The sum of a row, halves added to one another: the same on every machine.
float sum_of_row(const float* row) {
    float part[kLanes / 2];
    for (unsigned e = 0; e < kLanes / 2; ++e) part[e] = row[e] + row[e + kLanes / 2];
    for (unsigned half = kLanes / 4; half; half /= 2)
        for (unsigned e = 0; e < half; ++e) part[e] += part[e + half];
    return part[0];
}

double median_of(std::vector<double>& values) {
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    if (values.size() % 2) return *middle;
    return (*std::max_element(values.begin(), middle) + *middle) / 2;
}

class Survey {
public:
    explicit Survey(EncodeGroup& group)
        : group_(group),
          tokens_(group.shape),
          reader_(group),
          rows_(reader_.widest() * kLanes),
          head_sums_(reader_.widest() * kLanes),
          zeros_(std::max<size_t>(reader_.widest(), kLanes)),
          centre_(group.shape.channels),
          sums_(group.shape.channels),
          norms_(tokens_.places() * kLanes),
          largest_(tokens_.places() * kLanes) {}

    void run() {
        reader_.prefetch();
        for (int round = 0; round < kOutlierRounds; ++round) {
            keep_ = tokens_.keep(group_.exempt);
            find_centre();
            sweep();
            if (!exempt_outliers()) break;
        }
        keep_ = tokens_.keep(group_.exempt);
        set_mean();
    }

private:
    size_t kept() const { return group_.shape.tokens - group_.exempt.size(); }

    template <class Use>
    void for_each_head(const Use& use) const {
        size_t channel = 0;
        for (const EncodePlane& plane : group_.planes)
            for (size_t head = 0; head < plane.heads; ++head, channel += plane.dim)
                use(plane, head, channel);
    }

    // The mean of one place. Norms and sums are taken from there, or they would be differences of
    // large numbers.
    void find_centre() {
        const size_t place = tokens_.places() / 2;
        const uint32_t* const keep = &keep_[place * kLanes];
        const auto count = static_cast<float>(std::count(keep, keep + kLanes, ~uint32_t{0}));
        float norms[kLanes] = {};
        uint32_t largest[kLanes] = {};
        for_each_head([&](const EncodePlane& plane, size_t head, size_t channel) {
            reader_.read(plane, head, place, rows_.data());
            std::fill_n(head_sums_.begin(), plane.dim * kLanes, 0.0f);
            kernels().encode_rows.survey_rows(rows_.data(), plane.dim, plane.weight, zeros_.data(),
                                              keep, head_sums_.data(), norms, largest);
            for (size_t i = 0; i < plane.dim; ++i)
                centre_[channel + i] =
                    count > 0 ? sum_of_row(&head_sums_[i * kLanes]) / count : 0.0f;
        });
    }

    void sweep() {
        std::fill(norms_.begin(), norms_.end(), 0.0f);
        std::fill(largest_.begin(), largest_.end(), 0u);
        for_each_head([&](const EncodePlane& plane, size_t head, size_t channel) {
            std::fill_n(head_sums_.begin(), plane.dim * kLanes, 0.0f);
            for (size_t place = 0; place < tokens_.places(); ++place) {
                reader_.read(plane, head, place, rows_.data());
                kernels().encode_rows.survey_rows(
                    rows_.data(), plane.dim, plane.weight, &centre_[channel],
                    &keep_[place * kLanes], head_sums_.data(), &norms_[place * kLanes],
                    &largest_[place * kLanes]);
            }
            for (size_t i = 0; i < plane.dim; ++i)
                sums_[channel + i] = sum_of_row(&head_sums_[i * kLanes]);
        });
        group_.refused = std::any_of(largest_.begin(), largest_.end(),
                                     [](uint32_t bits) { return bits > kLargestBits; });
    }

    // Returns whether tokens became exempt that were not.
    bool exempt_outliers() {
        const size_t before = group_.exempt.size();
        std::vector<double> norms;
        for (size_t i = 0; i < norms_.size(); ++i)
            if (keep_[i]) norms.push_back(std::sqrt(static_cast<double>(norms_[i])));
        double limit = INFINITY;
        if (norms.size() >= kFewTokens) limit = kOutlierNorm * std::max(median_of(norms), 1e-30);
        for (size_t i = 0; i < norms_.size(); ++i)
            if (keep_[i] && (std::sqrt(static_cast<double>(norms_[i])) > limit ||
                             largest_[i] > kHugeBits))
                group_.exempt.push_back(static_cast<uint32_t>(
                    tokens_.token(i / kLanes, static_cast<unsigned>(i % kLanes))));
        std::sort(group_.exempt.begin(), group_.exempt.end());
        return group_.exempt.size() > before;
    }

    void set_mean() {
        const size_t channels = group_.shape.channels;
        const auto count = static_cast<double>(kept());
        std::vector<double> exact(channels);
        double most = 0;
        for (size_t c = 0; c < channels; ++c) {
            exact[c] = static_cast<double>(centre_[c]) + static_cast<double>(sums_[c]) / count;
            most = std::max(most, std::fabs(exact[c]));
        }
        group_.mean_scale = 0;
        group_.mean_levels.assign(channels, 0);
        if (kept() >= kFewTokens) group_.mean_scale = static_cast<float>(most / kMeanLevels);
        double energy = 0;
        for (size_t i = 0; i < norms_.size(); ++i)
            if (keep_[i]) energy += static_cast<double>(norms_[i]);
        for (size_t c = 0; c < channels; ++c) {
            double mean = 0;
            if (group_.mean_scale > 0) {
                const double level =
                    std::rint(exact[c] / static_cast<double>(group_.mean_scale));
                const double bounded =
                    std::clamp<double>(level, -kMeanLevels, kMeanLevels);
                group_.mean_levels[c] = static_cast<int8_t>(bounded);
                mean = static_cast<double>(static_cast<float>(bounded) * group_.mean_scale);
            }
            const double moved = mean - static_cast<double>(centre_[c]);
            energy -= 2 * moved * static_cast<double>(sums_[c]) - count * moved * moved;
        }
        group_.energy = kept() ? std::max(energy, 0.0) : 0.0;
    }

    EncodeGroup& group_;
    TokenRows tokens_;
    UnitReader reader_;
    AlignedVector<float> rows_, head_sums_, zeros_;
    std::vector<float> centre_, sums_;  // by channel; sums are from the centre
    std::vector<float> norms_;          // by place and element, squared
    std::vector<uint32_t> largest_, keep_;
};

}  // namespace

std::vector<uint32_t> TokenRows::keep(std::span<const uint32_t> exempt) const {
    std::vector<uint32_t> rows(places_ * kLanes);
    for (size_t place = 0; place < places_; ++place)
        for (unsigned e = 0; e < kLanes; ++e)
            rows[place * kLanes + e] = token(place, e) < shape_.tokens ? ~uint32_t{0} : 0;
    for (const uint32_t token : exempt)
        rows[token % places_ * kLanes + kLanes - 1 - token / places_] = 0;
    return rows;
}

UnitReader::UnitReader(const EncodeGroup& group)
    : tokens_(group.shape), held_(group.shape.tokens), planes_(group.planes) {
    for (const EncodePlane& plane : group.planes)
        widest_ = std::max<size_t>(widest_, plane.dim);
    nothing_.resize(widest_ * sizeof(float));
}

void UnitReader::read(const EncodePlane& plane, size_t head, size_t place, float* rows) const {
    const std::byte* memory[kLanes];
    for (unsigned e = 0; e < kLanes; ++e) {
        const uint64_t token = tokens_.token(place, e);
        memory[e] = token < held_ ? plane.data + static_cast<int64_t>(token) * plane.token_stride +
                                        static_cast<int64_t>(head) * plane.head_stride
                                  : nothing_.data();
    }
    const LadderEncodeRows& kernel = kernels().encode_rows;
    kernel.read_tile[static_cast<size_t>(plane.type)](memory, plane.dim, rows);
    if (plane.cos)
        kernel.turn_back(rows, plane.half, plane.interleaved, plane.cos + place * kLanes,
                         plane.sin + place * kLanes, tokens_.places() * kLanes);
}

// Rows of a tile lie so far apart that processors do not foresee the next one. So a plane is asked
// for as it lies in memory, and is in the second level when its tiles are read.
void UnitReader::prefetch() const {
    constexpr size_t kLine = 64, kMost = 1 << 20;
    if (planes_.size() != 1) return;
    const EncodePlane& plane = planes_[0];
    const size_t bytes = plane.dim * (plane.type == KVType::Float32 ? 4 : 2);
    if (held_ * plane.heads * bytes > kMost) return;
    for (uint64_t token = 0; token < held_; ++token)
        for (size_t head = 0; head < plane.heads; ++head) {
            const std::byte* const row = plane.data +
                                         static_cast<int64_t>(token) * plane.token_stride +
                                         static_cast<int64_t>(head) * plane.head_stride;
            for (size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(row + at, 0, 2);
        }
}

void survey_group(EncodeGroup& group) {
    if (group.shape.tokens && group.shape.channels) Survey(group).run();
    else group.mean_levels.assign(group.shape.channels, 0);
}

void survey_groups(std::span<EncodeGroup> groups, size_t threads) {
    std::atomic<size_t> next = 0;
    run_crew(std::min(threads, groups.size()), [&](size_t) {
        for (size_t i; (i = next++) < groups.size();)
            if (!groups[i].components) survey_group(groups[i]);
    });
}

}  // namespace cachegen
