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
#include "lossless_fit.h"
#include "rans.h"

namespace cachegen {
namespace {

constexpr uint64_t kStreamSteps = 4096;
constexpr uint8_t kFlip = 0x80;
// Starting a thread takes as long as encoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 16;
// Sums of 16-bit signs, until they are moved to wider ones.
constexpr uint64_t kMostSigns = 32768;

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
        LosslessPlane coded = write(fit_lossless(counts_, costs_));
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
        for (size_t c = 0; c < channels_; ++c) {
            uint32_t* const row = &counts_[c * kMaxAlphabet];
            row[kLosslessEscape] = 0;
            const uint64_t others = std::accumulate(row, row + kMaxAlphabet, uint64_t{0});
            row[kLosslessEscape] = static_cast<uint32_t>(tokens_ - others);
        }
    }

    LosslessPlane write(const LosslessFit& fit) const {
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
            kernels().symbol_rows.split_planes(mantissas_[byte].data(), size, 0, some, plane_bytes,
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
    std::vector<uint32_t> counts_;  // rows of 32
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
