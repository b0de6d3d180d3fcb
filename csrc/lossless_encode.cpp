#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "channel_models.h"
#include "crew.h"
#include "dispatch.h"
#include "lossless.h"
#include "rans.h"

namespace cachegen {
namespace {

constexpr uint64_t kStreamSteps = 4096;
constexpr int kRounds = 4;
constexpr int64_t kBit = 1024;  // units of costs
constexpr uint8_t kFlip = 0x80;
// Starting a thread takes as long as encoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 16;
// Counts of the kernel are 16 bits, and sums of so many costs 32.
constexpr uint64_t kMostCounted = 32767;
// Sums of 16-bit signs, until they are moved to wider ones.
constexpr uint64_t kMostSigns = 32768;

// One table for each class of channels, and the class of each channel.
struct Fit {
    std::vector<uint16_t> freqs;  // rows of 32
    std::vector<uint8_t> classes;
};

// Encodes one plane after the other; memory is kept from plane to plane.
class LosslessEncoder {
public:
    explicit LosslessEncoder(const LosslessCosts& costs) : costs_(costs) {}

    LosslessPlane encode(const Plane<const std::byte>& plane) {
        plane_ = &plane;
        fields_ = fields_of(plane.type);
        rows_ = &kernels().lossless_rows[static_cast<size_t>(plane.type)];
        tokens_ = static_cast<uint64_t>(plane.tokens);
        channels_ = static_cast<size_t>(plane.heads * plane.dim);
        // Heads side by side are one long head.
        const bool is_whole = plane.head_stride == plane.dim * static_cast<int64_t>(fields_.bytes);
        heads_ = is_whole ? 1 : plane.heads;
        dim_ = heads_ ? channels_ / static_cast<size_t>(heads_) : 0;
        const uint64_t size = tokens_ * channels_;
        if (size == 0 || size > std::numeric_limits<int32_t>::max()) return {};
        survey();
        part();
        count();
        LosslessPlane coded = write(fit());
        if (coded.side.size() + coded.body.size() >= size * fields_.bytes) return {};
        return coded;
    }

private:
    // For each head, or for all at once: a row of values, and its first channel.
    template <class Work>
    void each_run(uint64_t token, const Work& work) const {
        for (int64_t head = 0; head < heads_; ++head)
            work(plane_->row(static_cast<int64_t>(token), head), static_cast<size_t>(head) * dim_);
    }

    // Finds top_, flip_ and left_out_.
    void survey() {
        const size_t width = fields_.bytes;
        std::vector<uint32_t> largest(channels_), signs(channels_);  // of elements, 2 or 4 bytes
        auto* const top = reinterpret_cast<std::byte*>(largest.data());
        auto* const negative = reinterpret_cast<std::byte*>(signs.data());
        const auto at = [&](const std::vector<uint32_t>& row, size_t channel) -> uint32_t {
            if (width == 4) return row[channel];
            uint16_t element;
            std::memcpy(&element, reinterpret_cast<const std::byte*>(row.data()) + 2 * channel, 2);
            return element;
        };
        std::vector<uint64_t> sums(channels_);
        uint32_t seen = 0;
        for (uint64_t token = 0; token < tokens_; ++token) {
            each_run(token, [&](const std::byte* values, size_t channel) {
                seen |= rows_->survey(values, dim_, top + channel * width,
                                      negative + channel * width);
            });
            if ((token + 1) % kMostSigns && token + 1 < tokens_) continue;
            for (size_t c = 0; c < channels_; ++c) sums[c] += at(signs, c);
            std::fill(signs.begin(), signs.end(), 0u);
        }
        left_out_ = static_cast<unsigned>(std::countr_zero(seen | 1u << fields_.mantissa));
        top_.resize(channels_);
        flip_.resize(channels_);
        for (size_t c = 0; c < channels_; ++c) {
            top_[c] = static_cast<uint8_t>(at(largest, c));
            flip_[c] = 2 * sums[c] > tokens_;
        }
    }

    // Fills symbols_, mantissas_ and listed_.
    void part() {
        const uint64_t size = tokens_ * channels_;
        bytes_ = static_cast<unsigned>(ceil_div(fields_.mantissa - left_out_, 8));
        symbols_.resize(size);
        for (unsigned byte = 0; byte < bytes_; ++byte) mantissas_[byte].resize(size);
        listed_.clear();
        LosslessRow row{};
        row.left_out = left_out_;
        row.bytes = bytes_;
        row.size = dim_;
        for (uint64_t token = 0; token < tokens_; ++token)
            each_run(token, [&](const std::byte* values, size_t channel) {
                const uint64_t begin = token * channels_ + channel;
                row.top = &top_[channel];
                row.flip = &flip_[channel];
                row.symbols = &symbols_[begin];
                for (unsigned byte = 0; byte < bytes_; ++byte)
                    row.mantissas[byte] = &mantissas_[byte][begin];
                if (rows_->part(row, values) >= 2 * kListedDistance) list(values, row.symbols);
            });
    }

    void list(const std::byte* values, const uint8_t* symbols) {
        for (size_t i = 0; i < dim_; ++i) {
            if (symbols[i] < 2 * kListedDistance) continue;
            uint32_t bits = 0;
            std::memcpy(&bits, values + i * fields_.bytes, fields_.bytes);
            listed_.push_back(static_cast<uint8_t>(bits >> fields_.mantissa & fields_.infinite()));
        }
    }

    // Counts symbols, all from the escape index on as one.
    void count() {
        counts_.resize(channels_ * kMaxAlphabet);
        count_symbols({tokens_, channels_, symbols_.data()}, 0, kMaxAlphabet, counts_.data());
        everywhere_.assign(kMaxAlphabet, 0);
        for (size_t c = 0; c < channels_; ++c) {
            uint32_t* const row = &counts_[c * kMaxAlphabet];
            row[kLosslessEscape] = 0;
            row[kLosslessEscape] =
                static_cast<uint32_t>(tokens_ - std::accumulate(row, row + kMaxAlphabet, uint64_t{0}));
            for (unsigned v = 0; v < kMaxAlphabet; ++v) everywhere_[v] += row[v];
        }
        if (tokens_ <= kMostCounted) narrow_.assign(counts_.begin(), counts_.end());
    }

    // Chooses 1 to 16 tables, and one of them for every channel, by the bits they take in all.
    Fit fit() {
        // How far symbols lie from the top, in the mean, orders channels from narrow to wide.
        std::vector<uint64_t> spread(channels_);
        for (size_t c = 0; c < channels_; ++c)
            for (unsigned v = 0; v < kMaxAlphabet; ++v)
                spread[c] += uint64_t{v} * counts_[c * kMaxAlphabet + v];
        std::vector<size_t> order(channels_);
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return spread[a] < spread[b]; });
        Fit best;
        int64_t least = std::numeric_limits<int64_t>::max();
        for (size_t number = 1; number <= std::min<size_t>(kMostLosslessTables, channels_);
             number *= 2) {
            Fit fit{{}, std::vector<uint8_t>(channels_)};
            for (size_t i = 0; i < channels_; ++i)
                fit.classes[order[i]] = static_cast<uint8_t>(i * number / channels_);
            find_tables(fit, number);
            for (int round = 0; number > 1 && round < kRounds; ++round) {
                // Tables of the same classes would be the same.
                if (!choose_classes(fit, number)) break;
                find_tables(fit, number);
            }
            const int64_t bits = payload(fit) + kBit * 16 * kMaxAlphabet * static_cast<int64_t>(number);
            if (bits >= least) continue;
            least = bits;
            best = std::move(fit);
        }
        return best;
    }

    // One table for each class, in which every symbol of the plane can be coded.
    void find_tables(Fit& fit, size_t number) const {
        std::vector<uint32_t> sums(number * kMaxAlphabet);
        for (size_t c = 0; c < channels_; ++c)
            for (unsigned v = 0; v < kMaxAlphabet; ++v)
                sums[fit.classes[c] * kMaxAlphabet + v] += counts_[c * kMaxAlphabet + v];
        for (size_t i = 0; i < sums.size(); ++i)
            sums[i] = everywhere_[i % kMaxAlphabet] ? sums[i] + 1 : 0;
        fit.freqs.resize(sums.size());
        normalize_counts(sums, kMaxAlphabet, costs_.bits_saved, fit.freqs.data());
    }

    // Returns whether any class changed.
    bool choose_classes(Fit& fit, size_t number) const {
        std::vector<int16_t> costs(number * kMaxAlphabet);  // as class_bits takes them
        for (size_t n = 0; n < number; ++n)
            for (unsigned v = 0; v < kMaxAlphabet; ++v)
                costs[2 * (v / 2 * number + n) + v % 2] = cost_of(fit, n, v);
        bool changed = false;
        for (size_t c = 0; c < channels_; ++c) {
            const uint8_t chosen = cheapest(fit, costs, number, c);
            changed |= chosen != fit.classes[c];
            fit.classes[c] = chosen;
        }
        return changed;
    }

    uint8_t cheapest(const Fit& fit, const std::vector<int16_t>& costs, size_t number,
                     size_t channel) const {
        if (tokens_ <= kMostCounted) {
            uint32_t bits[kMostLosslessTables];
            const uint32_t least = kernels().symbol_rows.class_bits(
                &narrow_[channel * kMaxAlphabet], costs.data(), number, bits);
            return static_cast<uint8_t>(std::find(bits, bits + number, least) - bits);
        }
        int64_t bits[kMostLosslessTables];
        for (size_t n = 0; n < number; ++n) bits[n] = bits_of(fit, n, channel);
        return static_cast<uint8_t>(std::min_element(bits, bits + number) - bits);
    }

    int64_t payload(const Fit& fit) const {
        int64_t sum = 0;
        for (size_t c = 0; c < channels_; ++c) sum += bits_of(fit, fit.classes[c], c);
        return sum;
    }

    int64_t bits_of(const Fit& fit, size_t table, size_t channel) const {
        int64_t sum = 0;
        for (unsigned v = 0; v < kMaxAlphabet; ++v)
            sum += int64_t{counts_[channel * kMaxAlphabet + v]} * cost_of(fit, table, v);
        return sum;
    }

    int16_t cost_of(const Fit& fit, size_t table, unsigned value) const {
        return costs_.costs[fit.freqs[table * kMaxAlphabet + value]];
    }

    LosslessPlane write(const Fit& fit) const {
        const size_t number = fit.freqs.size() / kMaxAlphabet;
        LosslessPlane coded;
        const std::vector<uint8_t> escapes(number, kLosslessEscape);
        const Tables tables(fit.freqs, escapes, number, kMaxAlphabet);
        const std::vector<uint16_t> models(fit.classes.begin(), fit.classes.end());
        const Coding coding{{tokens_, channels_}, tables, models, false, {}};
        const std::vector<uint8_t> rans = encode_segment(symbols_.data(), coding, kStreamSteps);

        const size_t table_bytes = 2 * fit.freqs.size();
        coded.side.assign({static_cast<uint8_t>(number), static_cast<uint8_t>(left_out_), 0, 0});
        coded.side.resize(4 + table_bytes);
        std::memcpy(&coded.side[4], fit.freqs.data(), table_bytes);
        coded.side.insert(coded.side.end(), top_.begin(), top_.end());
        for (size_t c = 0; c < channels_; ++c)
            coded.side.push_back(static_cast<uint8_t>(fit.classes[c] | (flip_[c] ? kFlip : 0)));
        coded.side.insert(coded.side.end(), listed_.begin(), listed_.end());

        const size_t size = symbols_.size(), plane_bytes = ceil_div(size, 8);
        const unsigned bits = fields_.mantissa - left_out_;
        const auto length = static_cast<uint32_t>(rans.size());
        coded.body.resize(sizeof length + rans.size() + bits * plane_bytes);
        std::memcpy(coded.body.data(), &length, sizeof length);
        std::copy(rans.begin(), rans.end(), coded.body.begin() + sizeof length);
        uint8_t* planes = coded.body.data() + sizeof length + rans.size();
        for (unsigned byte = 0; byte < bytes_; ++byte) {
            const unsigned some = std::min(8u, bits - 8 * byte);
            kernels().symbol_rows.split_planes(mantissas_[byte].data(), size, some, plane_bytes,
                                               planes);
            planes += some * plane_bytes;
        }
        return coded;
    }

    const LosslessCosts& costs_;
    const Plane<const std::byte>* plane_ = nullptr;
    const LosslessRows* rows_ = nullptr;
    FloatFields fields_{};
    uint64_t tokens_ = 0;
    size_t channels_ = 0, dim_ = 0;
    int64_t heads_ = 0;
    unsigned left_out_ = 0, bytes_ = 0;
    std::vector<uint8_t> top_, flip_, symbols_, listed_;
    std::vector<uint8_t> mantissas_[3];
    std::vector<uint32_t> counts_;      // rows of 32
    std::vector<uint16_t> narrow_;      // the same, if they fit
    std::vector<uint64_t> everywhere_;  // their sums
};

}  // namespace

std::vector<LosslessPlane> encode_lossless(std::span<const Plane<const std::byte>> planes,
                                           const LosslessCosts& costs, size_t threads) {
    uint64_t values = 0;
    for (const auto& plane : planes)
        values += static_cast<uint64_t>(plane.tokens * plane.heads * plane.dim);
    std::vector<LosslessPlane> coded(planes.size());
    std::atomic<size_t> next = 0;
    const size_t most = std::min(threads, planes.size());
    run_crew(std::min<uint64_t>(most, values / kValuesPerThread + 1), [&](size_t) {
        LosslessEncoder encoder(costs);
        for (size_t i; (i = next.fetch_add(1)) < planes.size();)
            coded[i] = encoder.encode(planes[i]);
    });
    return coded;
}

}  // namespace cachegen
