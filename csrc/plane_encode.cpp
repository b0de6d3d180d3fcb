#include "plane_encode.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>

#include "aligned.h"
#include "channel_models.h"
#include "crew.h"
#include "dispatch.h"
#include "rans.h"

namespace cachegen {
namespace {

// The restart spacing of these codecs: whole places, about so many steps.
constexpr uint64_t kStreamSteps = 1024;
constexpr unsigned kHighBits = 5;

// Encodes one plane after the other in the same memory.
class PlaneEncoder {
public:
    PlaneEncoder(const PlaneEncode& work, BodyStore& store) : work_(work), store_(store) {}

    EncodedPlane encode(const PlaneToEncode& plane) {
        shape_ = {static_cast<uint64_t>(plane.values.tokens),
                  static_cast<uint64_t>(plane.values.heads * plane.values.dim)};
        size_ = shape_.tokens * shape_.channels;
        symbols_.resize(size_);
        quantize(plane.values, plane.levels, work_.per_head, symbols_.data(), plane.scales);
        shift_ = work_.low_bits;
        if (!work_.low_bits)
            while (2 * plane.levels >> shift_ >= kMaxAlphabet) ++shift_;
        EncodedPlane result;
        if (size_ || work_.low_bits) result.tables = find_models(plane.levels);
        std::span<const uint8_t> body = size_ ? encode_body() : std::span<const uint8_t>();
        const size_t plain = work_.low_bits ? kHighBits * ceil_div(size_, 8) : size_;
        result.kind = MatrixKind::Rans;
        if (body.size() + result.tables.size() < plain) {
            result.body = store_.copy(body);
        } else {
            result.tables.clear();
            result.kind = work_.low_bits ? MatrixKind::Packed : MatrixKind::Bytes;
            result.body = work_.low_bits ? pack(work_.low_bits, kHighBits)
                                         : store_.copy({symbols_.data(), size_});
        }
        if (work_.low_bits) result.low = pack(0, work_.low_bits);
        return result;
    }

private:
    std::span<const uint8_t> pack(unsigned first, unsigned count) {
        const size_t plane_bytes = ceil_div(size_, 8);
        const std::span<uint8_t> planes = store_.take(count * plane_bytes);
        kernels().symbol_rows.split_planes(symbols_.data(), size_, first, count, plane_bytes,
                                           planes.data());
        return planes;
    }

    // Returns the tables as they are stored.
    std::vector<uint8_t> find_models(unsigned levels) {
        const size_t channels = shape_.channels;
        alphabet_ = work_.shared ? kMaxAlphabet : (2 * levels >> shift_) + 1;
        counts_.resize(channels * alphabet_);
        count_symbols({shape_.tokens, channels, symbols_.data()}, shift_, alphabet_,
                      counts_.data());
        models_.resize(channels);
        if (work_.shared) {
            std::vector<uint8_t> side(2 * channels);
            fit_classes(counts_, work_.costs, work_.costs.size() / kMaxAlphabet, side.data(),
                        side.data() + channels);
            std::copy_n(side.begin(), channels, models_.begin());
            rotations_.assign(side.begin() + static_cast<std::ptrdiff_t>(channels), side.end());
            return side;
        }
        std::iota(models_.begin(), models_.end(), uint16_t{0});
        std::vector<uint8_t> side(2 * channels * alphabet_);
        freqs_.resize(channels * alphabet_);
        normalize_counts(counts_, alphabet_, work_.bits_saved, freqs_.data());
        std::copy_n(reinterpret_cast<const uint8_t*>(freqs_.data()), side.size(), side.data());
        return side;
    }

    std::span<const uint8_t> encode_body() {
        const uint64_t channels = shape_.channels;
        const uint64_t steps = channels * std::max<uint64_t>(1, kStreamSteps / channels);
        shifts_.assign(shift_ && !work_.low_bits ? channels : 0, static_cast<uint8_t>(shift_));
        if (work_.shared)
            return encoder_.encode(symbols_.data(),
                                   {shape_, *work_.shared, models_, false, shifts_, nullptr,
                                    rotations_, work_.low_bits},
                                   steps);
        // A model has at least two symbols, of which one may never occur.
        std::vector<uint16_t> wide;
        if (alphabet_ == 1) {
            wide.assign(2 * channels, 0);
            for (size_t c = 0; c < channels; ++c) wide[2 * c] = freqs_[c];
        }
        const std::span<const uint16_t> freqs = wide.empty() ? freqs_ : wide;
        const Tables tables(freqs, {}, channels, freqs.size() / channels);
        inverse_.resize(channels);
        build_inverse_tables(freqs, tables.alphabet(), tables.buckets(), inverse_.data());
        return encoder_.encode(symbols_.data(),
                               {shape_, tables, models_, false, shifts_, nullptr, {}, 0,
                                inverse_.data()},
                               steps);
    }

    const PlaneEncode& work_;
    BodyStore& store_;
    Shape shape_;
    size_t size_ = 0, alphabet_ = 0;
    unsigned shift_ = 0;  // low bits of a symbol that are not coded
    AlignedVector<uint8_t> symbols_;
    std::vector<uint32_t> counts_;
    std::vector<uint16_t> models_, freqs_;
    std::vector<uint8_t> rotations_, shifts_;
    AlignedVector<InverseTable> inverse_;
    SegmentEncoder encoder_;
};

}  // namespace

EncodedPlanes encode_planes(const PlaneEncode& work) {
    const size_t count = work.planes.size(), threads = std::min(work.threads, count);
    EncodedPlanes results{std::vector<EncodedPlane>(count), std::vector<BodyStore>(threads)};
    std::vector<std::exception_ptr> errors(count);
    std::atomic<size_t> next = 0;
    if (!count) return results;
    run_crew(threads, [&](size_t thread) {
        PlaneEncoder encoder(work, results.stores[thread]);
        for (size_t i; (i = next++) < count;) {
            try {
                results.planes[i] = encoder.encode(work.planes[i]);
            } catch (...) {
                errors[i] = std::current_exception();
            }
        }
    });
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
    return results;
}

}  // namespace cachegen
