// The second pass over the input: digits, classes, errors, and the bytes of all passes.
#include "fused_encode.h"

#include <algorithm>
#include <atomic>

#include "crew.h"
#include "dispatch.h"

namespace cachegen {
namespace {

// Turns groups to digits; its buffers serve one group after the other.
class Quantizer {
public:
    Quantizer(unsigned passes, float step) : passes_(passes), inverse_(1.0f / step) {
        const auto coarse = static_cast<float>(power_of_three(passes - 1));
        reach_ = (static_cast<float>(kMaxCoarse) + 0.6f) * coarse;
    }

    // Tokens beyond the reach of pass 0 become exempt; then the means are others.
    GroupDigits& run(EncodeGroup& group) {
        digitise(group);
        if (find_beyond(group)) {
            if (!group.components) survey_group(group);
            digitise(group);
        }
        return digits_;
    }

private:
    void digitise(const EncodeGroup& group) {
        const TokenRows tokens(group.shape);
        const size_t channels = group.shape.channels, places = tokens.places();
        keep_ = tokens.keep(group.exempt);
        largest_.assign(places * kLanes, 0.0f);
        digits_.codes.resize(places * channels * kLanes);
        digits_.symbols.resize(places * channels * kLanes);
        digits_.bins.resize(ceil_div(places, kErrorPlaces) * channels * kLanes);
        const bool tallies =
            kernels().encode_rows.tallies[passes_ - 1] && places <= kTallyPlaces;
        digits_.tallies.assign(tallies ? channels * kTally : 0, 0);
        mean_.resize(channels);
        for (size_t c = 0; c < channels; ++c)
            mean_[c] = group.mean_levels.empty()
                           ? 0.0f
                           : static_cast<float>(group.mean_levels[c]) * group.mean_scale;
        if (group.components) {
            digitise_components(group, places);
            return;
        }
        const UnitReader reader(group);
        reader.prefetch();
        rows_.resize(reader.widest() * kLanes);
        size_t channel = 0;
        for (const EncodePlane& plane : group.planes)
            for (size_t head = 0; head < plane.heads; ++head, channel += plane.dim)
                for (size_t place = 0; place < places; ++place) {
                    reader.read(plane, head, place, rows_.data());
                    digitise_rows(rows_.data(), plane.dim, plane.weight, channel, channels, place);
                }
    }

    void digitise_components(const EncodeGroup& group, size_t places) {
        constexpr size_t kPart = 64;
        const size_t channels = group.shape.channels;
        rows_.resize(kPart * kLanes);
        for (size_t place = 0; place < places; ++place)
            for (size_t channel = 0; channel < channels; channel += kPart) {
                const size_t count = std::min(kPart, channels - channel);
                for (size_t i = 0; i < count; ++i)
                    std::copy_n(group.components + ((channel + i) * places + place) * kLanes,
                                kLanes, &rows_[i * kLanes]);
                digitise_rows(rows_.data(), count, 1.0f, channel, channels, place);
            }
    }

    void digitise_rows(const float* rows, size_t count, float weight, size_t channel,
                       size_t channels, size_t place) {
        const size_t at = (place * channels + channel) * kLanes;
        const size_t measured = (place / kErrorPlaces * channels + channel) * kLanes;
        kernels().encode_rows.quantize_rows[passes_ - 1](
            {rows, count, weight, &mean_[channel], inverse_, &keep_[place * kLanes],
             &digits_.codes[at], &digits_.symbols[at],
             place % kErrorPlaces ? nullptr : &digits_.bins[measured],
             &largest_[place * kLanes],
             digits_.tallies.empty() ? nullptr : &digits_.tallies[channel * kTally]});
    }

    bool find_beyond(EncodeGroup& group) {
        const TokenRows tokens(group.shape);
        const size_t before = group.exempt.size();
        for (size_t i = 0; i < largest_.size(); ++i)
            if (largest_[i] > reach_)
                group.exempt.push_back(static_cast<uint32_t>(
                    tokens.token(i / kLanes, static_cast<unsigned>(i % kLanes))));
        std::sort(group.exempt.begin(), group.exempt.end());
        return group.exempt.size() > before;
    }

    unsigned passes_;
    float inverse_, reach_;
    GroupDigits digits_;
    AlignedVector<float> rows_, largest_;
    std::vector<float> mean_;
    std::vector<uint32_t> keep_;
};

}  // namespace

std::vector<BodyStore> encode_groups(std::span<EncodeGroup> groups, const EncodeSettings& settings,
                                     float step, size_t threads) {
    threads = std::max<size_t>(1, std::min(threads, groups.size()));
    std::vector<BodyStore> stores(threads);
    std::atomic<size_t> next = 0;
    run_crew(threads, [&](size_t thread) {
        Quantizer quantizer(settings.passes, step);
        PassWriter writer(stores[thread]);
        for (size_t i; (i = next++) < groups.size();) {
            GroupDigits& digits = quantizer.run(groups[i]);
            fit_group(groups[i], digits, settings);
            writer.write(groups[i], digits, settings);
        }
    });
    return stores;
}

}  // namespace cachegen
