#include <algorithm>
#include <array>
#include <bit>

#include "block.h"
#include "dispatch.h"
#include "error.h"
#include "rans.h"
#include "raw_digits.h"
#include "segment_layout.h"
#include "stream_reader.h"

namespace cachegen {
namespace {

// One stream of a segment: blocks of coded values from the kernel, what stands beside them (escape
// bytes, raw bits), and its place in the symbol matrix.
class StreamDecoder {
public:
    DecodeRun& run() { return reader_.run; }

    void open(std::span<const uint8_t> body, const Coding& coding, const StreamLayout& stream,
              uint64_t index) {
        coding_ = &coding;
        step_ = stream.begin_step;
        end_ = stream.end_step;
        reader_.open(body, stream, index);
    }

    bool is_done() const { return step_ == end_; }

    // Steps that can be decoded at once: they are at one place and fit the block.
    size_t steps_ahead() const {
        const uint64_t place_end = (step_ / coding_->shape.channels + 1) * coding_->shape.channels;
        return std::min<uint64_t>(std::min(end_, place_end) - step_, kBlockSteps);
    }

    void begin_block(size_t steps) {
        const BlockRows rows(coding_->shape, step_);
        run().models = coding_->models_at(step_);
        run().symbols = block_.bytes;
        run().lanes = rows.lanes;
        if (!coding_->contexts) return;
        kernels().gather(coding_->contexts + rows.begin, rows.stride, rows.lanes, steps,
                         contexts_.bytes);
        if (largest_of({contexts_.bytes, steps * kLanes}) > 1)
            reader_.refuse("context", "2 or more", "0 or 1");
        run().contexts = contexts_.bytes;
    }

    void end_block(size_t steps, uint8_t* symbols) {
        reader_.check_words();
        if (coding_->tables.any_escape()) add_escapes(steps);
        if (!coding_->shifts.empty()) add_raw_bits(steps);
        const BlockRows rows(coding_->shape, step_);
        if (symbols)
            kernels().scatter(block_.bytes, steps, symbols + rows.begin, rows.stride, rows.lanes);
        step_ += steps;
    }

    void close() const { reader_.close(); }

private:
    void add_escapes(size_t steps) {
        uint8_t escapes[kBlockSteps];
        uint32_t found[kBlockSteps];
        for (size_t step = 0; step < steps; ++step)
            escapes[step] = coding_->tables.escape(run().models[step]);
        kernels().find_bytes(block_.bytes, escapes, steps, found);
        const uint32_t active = ~uint32_t{0} >> (kLanes - run().lanes);
        for (size_t step = 0; step < steps; ++step) {
            // No decoded value is kNoEscape, which no alphabet reaches.
            for (uint32_t lanes = found[step] & active; lanes; lanes &= lanes - 1)
                block_.bytes[step * kLanes + static_cast<unsigned>(std::countr_zero(lanes))] =
                    reader_.next_escaped(escapes[step], step_ + step);
        }
    }

    void add_raw_bits(size_t steps) {
        const uint8_t* const shifts = &coding_->shifts[step_ % coding_->shape.channels];
        for (size_t step = 0; step < steps; ++step) {
            const unsigned shift = shifts[step];
            if (shift == 0) continue;
            add_raw_digits(reader_, &block_.bytes[step * kLanes], shift, run().lanes,
                           step_ + step);
        }
    }

    const Coding* coding_ = nullptr;
    uint64_t step_ = 0, end_ = 0;
    StreamReader reader_;
    Block block_, contexts_;
};

// Decodes several streams side by side, so that a kernel has independent work to overlap. Only the
// last stream of a segment may be shorter than the others, so the group shrinks from its end.
void decode_group(std::span<StreamDecoder> group, const Coding& coding, uint8_t* symbols) {
    const Kernels& kernel = kernels();
    const AliasTable* const tables = coding.tables.alias(coding.buckets());
    while (!group.empty()) {
        std::array<DecodeRun*, kGroupStreams> runs;
        size_t steps = kBlockSteps;
        for (const StreamDecoder& stream : group) steps = std::min(steps, stream.steps_ahead());
        for (size_t i = 0; i < group.size(); ++i) {
            group[i].begin_block(steps);
            runs[i] = &group[i].run();
        }
        kernel.decode_runs(tables, coding.buckets(), runs.data(), group.size(), steps);
        for (StreamDecoder& stream : group) stream.end_block(steps, symbols);
        while (!group.empty() && group.back().is_done()) {
            group.back().close();
            group = group.first(group.size() - 1);
        }
    }
}

}  // namespace

void decode_segment(std::span<const uint8_t> body, const Coding& coding, uint64_t first,
                    uint64_t count, uint8_t* symbols) {
    check_coding(coding, ErrorKind::Corrupt);
    const std::vector<StreamLayout> streams = parse_layout(body, coding.shape, coding.shifts);
    first = std::min<uint64_t>(first, streams.size());
    const uint64_t end = first + std::min<uint64_t>(count, streams.size() - first);
    std::vector<StreamDecoder> decoders(std::min<uint64_t>(kGroupStreams, end - first));
    for (uint64_t k = first; k < end; k += kGroupStreams) {
        const auto group = std::span(decoders).first(std::min<uint64_t>(kGroupStreams, end - k));
        for (size_t i = 0; i < group.size(); ++i)
            group[i].open(body, coding, streams[k + i], k + i);
        decode_group(group, coding, symbols);
    }
}

}  // namespace cachegen
