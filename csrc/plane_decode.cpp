#include "plane_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "crew.h"
#include "dispatch.h"
#include "error.h"
#include "plane_matrix.h"
#include "rows_convert.h"

namespace cachegen {
namespace {

constexpr unsigned kDigits = 32;  // of the frozen tables; rotations are modulo this
// Starting a thread takes as long as decoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 17;

void require(bool sound, const char* what, uint64_t got, uint64_t expected) {
    if (!sound)
        throw Error(ErrorKind::Geometry, what, std::to_string(got), std::to_string(expected));
}

size_t size_of(KVType type) { return type == KVType::Float32 ? 4 : 2; }

// What one thread keeps from plane to plane.
struct Scratch {
    std::vector<AliasTable> tables;
    std::vector<uint16_t> freqs, models;
    std::vector<uint8_t> shifts;
    std::vector<float> steps;
    std::vector<std::byte> anchors;
    std::array<MatrixStream, kGroupStreams> streams;
};

// Decodes one plane, matrix by matrix, run of channels by run of channels of a row.
class PlaneDecoder {
public:
    PlaneDecoder(const PlaneDecode& work, const QuantizedPlane& plane, const Kernels& kernel,
                 Scratch& scratch)
        : work_(work),
          plane_(plane),
          kernel_(kernel),
          stored_(kernel.per_type[static_cast<size_t>(work.stored)]),
          scratch_(scratch),
          width_(uint64_t{plane.target.heads} * plane.target.dim) {}

    void decode() {
        check();
        if (plane_.group_tokens) {
            const uint64_t anchors = ceil_div(plane_.tokens, plane_.group_tokens);
            scratch_.anchors.resize(anchors * width_ * size_of(work_.stored));
            decode_matrix(plane_.passes[0]);
            store_anchors(plane_.passes.size() == 1);
            is_delta_ = true;
        }
        if (is_delta_ == (plane_.passes.size() == 2)) decode_matrix(plane_.passes.back());
    }

private:
    void check() const {
        const uint64_t group = plane_.group_tokens, tokens = plane_.tokens;
        require(width_ == 0 || tokens <= Shape::kMaxSymbols / width_, "symbol matrix", tokens, 0);
        require(group != 1, "tokens of an anchor group", group, 2);
        const size_t count = plane_.passes.size();
        require(count >= 1 && count <= (group ? 2u : 1u), "passes", count, 1);
        const uint64_t anchors = group ? ceil_div(tokens, group) : tokens;
        const uint64_t rows[] = {anchors, tokens - anchors};
        for (size_t i = 0; i < count; ++i) {
            const MatrixSource& pass = plane_.passes[i];
            const uint64_t scales = pass.rows * (pass.per_head ? plane_.target.heads : 1);
            require(pass.rows == rows[i], "rows", pass.rows, rows[i]);
            require(pass.scales.size() == scales * size_of(work_.stored), "scales",
                    pass.scales.size(), scales);
            require(pass.levels >= 1 && pass.levels <= 127, "levels", pass.levels, 127);
            require(pass.shift + pass.low_bits <= 3, "digit shift", pass.shift, 3);
            const bool of_own = pass.classes.empty() && pass.kind == MatrixKind::Rans && pass.rows;
            const unsigned reach = 2 * pass.levels >> (pass.shift + pass.low_bits);
            require(!of_own || pass.alphabet <= reach + 1, "alphabet", pass.alphabet, reach + 1);
        }
    }

    void decode_matrix(const MatrixSource& pass) {
        pass_ = &pass;
        const uint64_t count = pass.rows * width_;
        low_ = {};
        if (!pass.low.empty()) low_ = PackedBits(pass.low, pass.low_bits, count);
        rotated_ = pass.kind == MatrixKind::Rans && !pass.rotations.empty();
        find_steps();
        switch (pass.kind) {
            case MatrixKind::Rans: return decode_rans();
            case MatrixKind::Bytes:
                if (pass.body.size() != count)
                    corrupt("byte segment", std::to_string(pass.body.size()),
                            std::to_string(count));
                return decode_bytes();
            case MatrixKind::Packed: return decode_packed();
        }
    }

    void decode_bytes() {
        for (uint64_t row = 0; width_ && row < pass_->rows; ++row) {
            const uint8_t* const symbols = pass_->body.data() + row * width_;
            check_range(kernel_.symbol_rows.largest(symbols, width_));
            store_run(row, 0, width_, symbols);
        }
    }

    void decode_packed() {
        const PackedBits bits(pass_->body, pass_->bits, pass_->rows * width_);
        for (uint64_t row = 0; row < pass_->rows; ++row) {
            for (uint64_t begin = 0; begin < width_; begin += kBlockSteps) {
                const size_t size = std::min<uint64_t>(kBlockSteps, width_ - begin);
                kernel_.symbol_rows.join_planes(bits.from(row * width_ + begin), size, turned_);
                finish_run(row, begin, size, turned_);
            }
        }
    }

    void decode_rans() {
        const Shape shape{pass_->rows, width_};
        scratch_.shifts.assign(width_, static_cast<uint8_t>(pass_->shift));
        const std::span<const uint8_t> shifts = scratch_.shifts;
        const auto streams = parse_layout(pass_->body, shape, pass_->shift ? shifts : shifts.first(0));
        if (streams.empty()) return;
        unsigned buckets = 0;
        const AliasTable* const tables = find_models(buckets);
        for (uint64_t first = 0; first < streams.size(); first += kGroupStreams) {
            const size_t count = std::min<uint64_t>(kGroupStreams, streams.size() - first);
            const auto group = std::span(scratch_.streams).first(count);
            for (size_t i = 0; i < count; ++i)
                group[i].open(pass_->body, shape, streams[first + i], first + i);
            decode_group(group, tables, buckets);
        }
    }

    // Makes models_ready: alias tables, and an index of one for each channel.
    const AliasTable* find_models(unsigned& buckets) {
        scratch_.models.resize(width_);
        if (!pass_->classes.empty()) {
            require(pass_->classes.size() == width_, "classes", pass_->classes.size(), width_);
            require(pass_->rotations.size() == width_, "rotations", pass_->rotations.size(), width_);
            for (size_t c = 0; c < width_; ++c) {
                scratch_.models[c] = pass_->classes[c];
                if (pass_->classes[c] >= work_.shared.count())
                    corrupt("table class", std::to_string(pass_->classes[c]),
                            "0 to " + std::to_string(work_.shared.count() - 1));
                if (pass_->rotations[c] >= kDigits)
                    corrupt("table rotation", std::to_string(pass_->rotations[c]), "0 to 31");
            }
            buckets = work_.shared.buckets();
            return work_.shared.alias(buckets);
        }
        const size_t alphabet = pass_->alphabet, count = width_ * alphabet;
        require(alphabet >= 2 && alphabet <= kMaxAlphabet, "alphabet", alphabet, kMaxAlphabet);
        require(width_ <= 1 << 16, "channels with models of their own", width_, 1 << 16);
        require(pass_->freqs.size() == 2 * count, "frequencies", pass_->freqs.size(), 2 * count);
        scratch_.freqs.resize(count);
        std::memcpy(scratch_.freqs.data(), pass_->freqs.data(), 2 * count);
        check_models(scratch_.freqs, alphabet);
        for (size_t c = 0; c < width_; ++c) scratch_.models[c] = static_cast<uint16_t>(c);
        if (scratch_.tables.size() < width_) scratch_.tables.resize(width_);
        buckets = alphabet <= 16 ? 16 : 32;
        build_alias_tables(scratch_.freqs, alphabet, buckets, scratch_.tables.data());
        return scratch_.tables.data();
    }

    // Streams side by side; only the last one of a matrix may be shorter than the others.
    void decode_group(std::span<MatrixStream> group, const AliasTable* tables, unsigned buckets) {
        while (!group.empty()) {
            std::array<DecodeRun*, kGroupStreams> runs;
            size_t steps = kBlockSteps;
            for (const MatrixStream& stream : group) steps = std::min(steps, stream.steps_ahead());
            for (size_t i = 0; i < group.size(); ++i) {
                group[i].begin_block(scratch_.models.data());
                runs[i] = &group[i].run();
            }
            kernel_.decode_runs(tables, buckets, runs.data(), group.size(), steps);
            for (MatrixStream& stream : group) {
                finish_block(stream, steps);
                stream.advance(steps);
            }
            while (!group.empty() && group.back().is_done()) group = group.first(group.size() - 1);
        }
    }

    void finish_block(MatrixStream& stream, size_t steps) {
        const Shape shape{pass_->rows, width_};
        const uint64_t place = stream.step() / width_, begin = stream.step() % width_;
        const unsigned lanes = shape.active_lanes(place);
        uint8_t* const block = stream.end_words();
        if (rotated_) {
            const uint8_t* const offsets = pass_->rotations.data() + begin;
            const unsigned largest = kernel_.symbol_rows.rotate_block(offsets, steps, lanes, block);
            if (!pass_->shift && !pass_->low_bits) check_range(largest);
        }
        if (pass_->shift) check_range(stream.add_raw(steps, pass_->shift));
        kernel_.scatter(block, steps, turned_, kBlockSteps, lanes);
        for (unsigned lane = 0; lane < lanes; ++lane)
            finish_run(lane * shape.places() + place, begin, steps, turned_ + lane * kBlockSteps);
    }

    // Symbols of some channels of a row are complete but for the digits that stand apart.
    void finish_run(uint64_t row, uint64_t begin, size_t size, uint8_t* symbols) {
        if (const unsigned bits = pass_->low_bits) {
            PackedRow low{};
            if (!pass_->low.empty()) low = low_.from(row * width_ + begin);
            check_range(kernel_.symbol_rows.add_low_digits(low, bits, 1u << (bits - 1), size,
                                                           symbols));
        }
        store_run(row, begin, size, symbols);
    }

    void check_range(unsigned largest) const {
        if (largest > 2 * pass_->levels)
            corrupt("symbol", std::to_string(largest), "0 to " + std::to_string(2 * pass_->levels));
    }

    // The same with values, head by head: a head has a scale and a place of its own.
    void store_run(uint64_t row, uint64_t begin, size_t size, const uint8_t* symbols) {
        const size_t element = size_of(work_.stored);
        const bool is_anchor = plane_.group_tokens && !is_delta_;
        const uint64_t token = is_delta_ ? token_of(row) : row;
        const int64_t offset = is_anchor ? 0 : plane_.target.offsets[token];
        if (offset == kSkippedToken) return;
        while (size) {
            const uint64_t head = begin / plane_.target.dim, at = begin % plane_.target.dim;
            const size_t some =
                std::min<uint64_t>({size, plane_.target.dim - at, kBlockSteps});
            const float step = step_of(row, head);
            const auto levels = static_cast<float>(pass_->levels);
            if (is_anchor) {
                std::byte* const to = scratch_.anchors.data() + (row * width_ + begin) * element;
                stored_.dequantize(symbols, some, levels, step, to);
            } else {
                std::byte* const to = plane_.target.data + offset +
                                      static_cast<int64_t>(head) * plane_.target.head_stride +
                                      static_cast<int64_t>(at * size_of(work_.type));
                if (!is_delta_ && work_.type == work_.stored) {
                    stored_.dequantize(symbols, some, levels, step, values_);
                    kernel_.symbol_rows.stream(values_, some * element, to);
                } else {
                    stored_.dequantize(symbols, some, levels, step, values_);
                    const uint64_t group = is_delta_ ? token / plane_.group_tokens : 0;
                    if (is_delta_)
                        add_rows(work_.stored,
                                 scratch_.anchors.data() + (group * width_ + begin) * element,
                                 values_, some);
                    convert_row(work_.stored, values_, work_.type, to, some);
                }
            }
            symbols += some;
            begin += some;
            size -= some;
        }
    }

    uint64_t token_of(uint64_t row) const {
        const uint64_t others = plane_.group_tokens - 1;
        return row / others * plane_.group_tokens + row % others + 1;
    }

    // Anchors as they are, and with `everywhere` in place of the tokens behind them too.
    void store_anchors(bool everywhere) const {
        const PlaneTarget& to = plane_.target;
        const size_t element = size_of(work_.stored);
        for (uint64_t token = 0; token < plane_.tokens; token += everywhere ? 1 : plane_.group_tokens) {
            if (to.offsets[token] == kSkippedToken) continue;
            const std::byte* from =
                scratch_.anchors.data() + token / plane_.group_tokens * width_ * element;
            for (uint32_t head = 0; head < to.heads; ++head, from += to.dim * element)
                convert_row(work_.stored, from, work_.type,
                            to.data + to.offsets[token] + head * to.head_stride, to.dim);
        }
    }

    // The step of every scale: of each row, or of each head of a row.
    void find_steps() {
        const uint64_t each = pass_->per_head ? plane_.target.heads : 1;
        scratch_.steps.resize(pass_->rows * each);
        switch (work_.stored) {
            case KVType::Float16: return find_steps_of<KVType::Float16>(each);
            case KVType::BFloat16: return find_steps_of<KVType::BFloat16>(each);
            case KVType::Float32: return find_steps_of<KVType::Float32>(each);
        }
    }

    template <KVType kType>
    void find_steps_of(uint64_t each) {
        using Traits = KVTraits<kType>;
        // Infinity is kMagnitude without its fraction bits; the sign bit is above both.
        constexpr auto infinity = kType == KVType::Float16    ? 0x7c00u
                                  : kType == KVType::BFloat16 ? 0x7f80u
                                                              : 0x7f800000u;
        const auto levels = static_cast<float>(pass_->levels);
        for (size_t i = 0; i < scratch_.steps.size(); ++i) {
            typename Traits::Bits scale;
            std::memcpy(&scale, pass_->scales.data() + i * sizeof scale, sizeof scale);
            if (scale >= infinity)
                corrupt("scale of token " + std::to_string(i / each) + ", head " +
                            std::to_string(i % each),
                        "negative, infinite or NaN", "a finite number, 0 or more");
            scratch_.steps[i] = Traits::to_float(scale) / levels;
        }
    }

    float step_of(uint64_t row, uint64_t head) const {
        return scratch_.steps[pass_->per_head ? row * plane_.target.heads + head : row];
    }

    const PlaneDecode& work_;
    const QuantizedPlane& plane_;
    const Kernels& kernel_;
    const Kernels::PerType& stored_;
    Scratch& scratch_;
    const uint64_t width_;  // C
    const MatrixSource* pass_ = nullptr;
    PackedBits low_;
    bool rotated_ = false, is_delta_ = false;
    alignas(64) uint8_t turned_[kLanes * kBlockSteps];
    alignas(64) std::byte values_[4 * kBlockSteps];
};

}  // namespace

void decode_planes(const PlaneDecode& work) {
    const Kernels& kernel = kernels();
    uint64_t values = 0;
    for (const QuantizedPlane& plane : work.planes)
        values += plane.tokens * plane.target.heads * plane.target.dim;
    const size_t most = std::min<size_t>(work.threads, work.planes.size());
    std::atomic<size_t> next = 0;
    run_crew(std::min<uint64_t>(most, values / kValuesPerThread + 1), [&](size_t) {
        Scratch scratch;
        for (size_t i; (i = next.fetch_add(1)) < work.planes.size();)
            PlaneDecoder(work, work.planes[i], kernel, scratch).decode();
        // What went past the caches is there before anything that this thread says afterwards.
        std::atomic_thread_fence(std::memory_order_seq_cst);
    });
}

}  // namespace cachegen
