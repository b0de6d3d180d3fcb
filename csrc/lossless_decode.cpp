#include <algorithm>
#include <atomic>
#include <cstring>

#include "crew.h"
#include "dispatch.h"
#include "lossless.h"
#include "plane_matrix.h"
#include "rans.h"
#include "rows_convert.h"

namespace cachegen {
namespace {

constexpr size_t kHead = 4;
constexpr uint8_t kFlip = 0x80;
// Starting a thread takes as long as decoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 17;

std::string in_bytes(uint64_t size) { return std::to_string(size) + " bytes"; }

// Decodes one plane after the other; memory is kept from plane to plane.
class LosslessDecoder {
public:
    explicit LosslessDecoder(const LosslessDecode& work)
        : work_(work),
          fields_(fields_of(work.stored)),
          element_(fields_of(work.type).bytes),
          kernel_(kernels()) {}

    void decode(const LosslessSource& plane) {
        plane_ = &plane;
        channels_ = uint64_t{plane.target.heads} * plane.target.dim;
        if (channels_ && plane.tokens > Shape::kMaxSymbols / channels_)
            throw Error(ErrorKind::Geometry, "plane", std::to_string(plane.tokens) + " tokens",
                        "up to 2^40 values");
        if (plane.side.empty()) return copy_rows();
        parse_side();
        decode_symbols();
        row_.resize(channels_ * fields_.bytes);
        for (uint64_t token = 0; token < plane.tokens; ++token) {
            join_row(token);
            store_row(token, row_.data());
        }
        if (next_listed_ != listed_.size())
            corrupt("listed exponents", std::to_string(listed_.size()),
                    std::to_string(next_listed_));
    }

private:
    void copy_rows() const {
        const uint64_t row = channels_ * fields_.bytes, size = plane_->tokens * row;
        if (plane_->body.size() != size)
            corrupt("lossless segment", in_bytes(plane_->body.size()), in_bytes(size));
        const auto* const values = reinterpret_cast<const std::byte*>(plane_->body.data());
        for (uint64_t token = 0; token < plane_->tokens; ++token)
            store_row(token, values + token * row);
    }

    void parse_side() {
        const std::span<const uint8_t> side = plane_->side;
        const uint64_t number = side[0], begin = kHead + 2 * kMaxAlphabet * number;
        const uint64_t fixed = begin + 2 * channels_;
        if (side.size() < kHead || number < 1 || number > kMostLosslessTables ||
            side[1] > fields_.mantissa || side[2] || side[3] || side.size() < fixed)
            corrupt("side information", in_bytes(side.size()),
                    in_bytes(fixed) + " or more, 1 to 16 tables");
        left_out_ = side[1];
        freqs_.resize(kMaxAlphabet * number);
        std::memcpy(freqs_.data(), &side[kHead], 2 * freqs_.size());
        top_ = side.subspan(begin, channels_);
        listed_ = side.subspan(fixed);
        next_listed_ = 0;
        models_.resize(channels_);
        flip_.resize(channels_);
        for (uint64_t c = 0; c < channels_; ++c) {
            const uint8_t kind = side[begin + channels_ + c];
            models_[c] = kind & (kFlip - 1);
            flip_[c] = kind >> 7;
            if (models_[c] >= number)
                corrupt("table of channel " + std::to_string(c), std::to_string(models_[c]),
                        "below " + std::to_string(number));
            if (top_[c] >= fields_.infinite())
                corrupt("top exponent of channel " + std::to_string(c), std::to_string(top_[c]),
                        "below " + std::to_string(fields_.infinite()));
        }
        for (const uint8_t exponent : listed_)
            if (exponent > fields_.infinite())
                corrupt("listed exponent", std::to_string(exponent),
                        "up to " + std::to_string(fields_.infinite()));
    }

    // Fills symbols_ and mantissas_.
    void decode_symbols() {
        const uint64_t size = plane_->tokens * channels_, plane_bytes = ceil_div(size, 8);
        const std::span<const uint8_t> body = plane_->body;
        const unsigned bits = fields_.mantissa - left_out_;
        uint32_t coded = 0;
        if (body.size() >= sizeof coded) std::memcpy(&coded, body.data(), sizeof coded);
        if (body.size() != sizeof coded + coded + bits * plane_bytes)
            corrupt("lossless segment", in_bytes(body.size()), "its parts");
        // No more than the target holds, which the caller has allocated.
        symbols_.resize(size);
        const std::vector<uint8_t> escapes(freqs_.size() / kMaxAlphabet, kLosslessEscape);
        const Tables tables(freqs_, escapes, escapes.size(), kMaxAlphabet);
        const Coding coding{{plane_->tokens, channels_}, tables, models_, false, {}};
        decode_segment(body.subspan(sizeof coded, coded), coding, 0, ~uint64_t{0}, symbols_.data());
        std::span<const uint8_t> rest = body.subspan(sizeof coded + coded);
        bytes_ = 0;
        for (unsigned begin = 0; begin < bits; begin += 8) {
            const unsigned some = std::min(8u, bits - begin);
            mantissas_[bytes_++] = PackedBits(rest.first(some * plane_bytes), some, size);
            rest = rest.subspan(some * plane_bytes);
        }
    }

    // The values of a token, in the type of the object.
    void join_row(uint64_t token) {
        const LosslessRows& rows = kernel_.lossless_rows[static_cast<size_t>(work_.stored)];
        unsigned found = 0;
        for (uint64_t c = 0; c < channels_; c += kBlockSteps) {
            const uint64_t at = token * channels_ + c;
            LosslessRow row{};
            row.size = std::min<uint64_t>(kBlockSteps, channels_ - c);
            row.top = &top_[c];
            row.flip = &flip_[c];
            row.symbols = &symbols_[at];
            row.left_out = left_out_;
            row.bytes = bytes_;
            for (unsigned byte = 0; byte < bytes_; ++byte) {
                kernel_.symbol_rows.join_planes(mantissas_[byte].from(at), row.size, joined_[byte]);
                row.mantissas[byte] = joined_[byte];
            }
            found |= rows.join(row, row_.data() + c * fields_.bytes);
        }
        if (found & kWrongDistance)
            corrupt("exponent of token " + std::to_string(token), "below 1", "those of the type");
        if (found & kAnyListed) add_listed(&symbols_[token * channels_]);
    }

    void add_listed(const uint8_t* symbols) {
        for (uint64_t c = 0; c < channels_; ++c) {
            if (symbols[c] < 2 * kListedDistance) continue;
            if (next_listed_ == listed_.size())
                corrupt("listed exponents", std::to_string(listed_.size()), "more");
            uint32_t bits = 0;
            std::byte* const value = row_.data() + c * fields_.bytes;
            std::memcpy(&bits, value, fields_.bytes);
            bits |= uint32_t{listed_[next_listed_++]} << fields_.mantissa;
            std::memcpy(value, &bits, fields_.bytes);
        }
    }

    void store_row(uint64_t token, const std::byte* values) const {
        const PlaneTarget& to = plane_->target;
        if (to.offsets[token] == kSkippedToken) return;
        for (uint32_t head = 0; head < to.heads; ++head, values += to.dim * fields_.bytes) {
            std::byte* const row = to.data + to.offsets[token] + head * to.head_stride;
            if (work_.type == work_.stored)
                kernel_.symbol_rows.stream(values, to.dim * element_, row);
            else
                convert_row(work_.stored, values, work_.type, row, to.dim);
        }
    }

    const LosslessDecode& work_;
    const FloatFields fields_;
    const size_t element_;  // bytes of one of the target
    const Kernels& kernel_;
    const LosslessSource* plane_ = nullptr;
    uint64_t channels_ = 0;
    unsigned left_out_ = 0, bytes_ = 0;
    std::span<const uint8_t> top_, listed_;
    size_t next_listed_ = 0;
    std::vector<uint16_t> freqs_, models_;
    std::vector<uint8_t> flip_, symbols_;
    std::vector<std::byte> row_;
    PackedBits mantissas_[3];
    alignas(64) uint8_t joined_[3][kBlockSteps];
};

}  // namespace

void decode_lossless(const LosslessDecode& work) {
    uint64_t values = 0;
    for (const LosslessSource& plane : work.planes)
        values += plane.tokens * plane.target.heads * plane.target.dim;
    const size_t most = std::min(work.threads, work.planes.size());
    std::atomic<size_t> next = 0;
    run_crew(std::min<uint64_t>(most, values / kValuesPerThread + 1), [&](size_t) {
        LosslessDecoder decoder(work);
        for (size_t i; (i = next.fetch_add(1)) < work.planes.size();)
            decoder.decode(work.planes[i]);
        // What went past the caches is there before anything that this thread says afterwards.
        std::atomic_thread_fence(std::memory_order_seq_cst);
    });
}

}  // namespace cachegen
