#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "aligned.h"
#include "bit_planes.h"
#include "block.h"
#include "dispatch.h"
#include "error.h"
#include "rans.h"
#include "segment_layout.h"

namespace cachegen {
namespace {

// A stream at work, from its last step to its first.
struct Stream {
    StreamLayout layout;
    EncodeRun run;
    uint64_t end;  // steps from here on are coded, or are in the block
    size_t left;   // steps of the block that are not coded yet: its first ones
    uint16_t* words_end;
    std::vector<uint32_t> raw_words;
    size_t raw_next;               // raw words from here on are filled
    std::vector<uint8_t> escapes;  // last one first
    Block block, contexts;
};

}  // namespace

struct SegmentEncoder::Memory {
    AlignedVector<uint16_t> words;  // of the streams at work, each filled from its end
    std::array<Stream, kGroupStreams> streams;
    std::vector<uint8_t> body;
};

// Encodes kGroupStreams streams side by side, then the next ones.
class SegmentEncoder::Work {
public:
    Work(Memory& memory, const uint8_t* symbols, const Coding& coding, uint64_t stream_steps)
        : symbols_(symbols),
          coding_(coding),
          stream_steps_(stream_steps),
          raw_(coding.shape, coding.shifts),
          inverse_(coding.inverse ? coding.inverse : coding.tables.inverse(coding.buckets())),
          words_(memory.words),
          streams_(memory.streams),
          body_(memory.body) {
        const size_t room = std::min(kGroupStreams * stream_steps, coding.shape.steps()) * kLanes;
        if (words_.size() < room) words_.resize(room);
    }

    void encode() {
        const uint64_t count = coding_.shape.streams(stream_steps_);
        body_.assign(4 + 8 * count, 0);
        put_u32(0, stream_steps_);
        for (uint64_t first = 0; first < count; first += kGroupStreams)
            encode_streams(first, std::min<uint64_t>(kGroupStreams, count - first));
    }

private:
    void put_u32(size_t at, uint64_t value) {
        const auto low = static_cast<uint32_t>(value);
        std::memcpy(body_.data() + at, &low, sizeof low);
    }

    void append(const void* data, size_t size) {
        const auto* bytes = static_cast<const uint8_t*>(data);
        body_.insert(body_.end(), bytes, bytes + size);
    }

    void encode_streams(uint64_t first, size_t count) {
        uint16_t* words = words_.data();
        for (size_t i = 0; i < count; ++i) {
            start_stream(streams_[i], first + i);
            words += (streams_[i].end - streams_[i].layout.begin_step) * kLanes;
            streams_[i].words_end = streams_[i].run.words = words;
        }
        while (true) {
            EncodeRun* runs[kGroupStreams];
            size_t active = 0, steps = kBlockSteps;
            for (size_t i = 0; i < count; ++i) {
                Stream& stream = streams_[i];
                if (!stream.left && stream.end > stream.layout.begin_step) read_block(stream);
                if (!stream.left) continue;
                runs[active++] = &stream.run;
                steps = std::min(steps, stream.left);
            }
            if (!active) break;
            bool uncodable = false;
            for (size_t i = 0; i < count; ++i) {
                Stream& stream = streams_[i];
                if (!stream.left) continue;
                stream.left -= steps;
                stream.run.models = coding_.models_at(stream.end + stream.left);
                stream.run.symbols = &stream.block.bytes[stream.left * kLanes];
                if (coding_.contexts)
                    stream.run.contexts = &stream.contexts.bytes[stream.left * kLanes];
            }
            kernels().encode_runs(inverse_, coding_.buckets(), runs, active, steps);
            for (size_t i = 0; i < active; ++i) uncodable |= runs[i]->uncodable;
            if (uncodable) refuse_first();
        }
        for (size_t i = 0; i < count; ++i) finish_stream(streams_[i], first + i);
    }

    void start_stream(Stream& stream, uint64_t index) const {
        stream.layout = stream_shape(coding_.shape, raw_, stream_steps_, index);
        stream.run = {};
        std::fill(std::begin(stream.run.state), std::end(stream.run.state), kStateMin);
        stream.end = stream.layout.end_step;
        stream.left = 0;
        stream.escapes.clear();
        stream.raw_words.assign(stream.layout.raw / 4, 0);
        stream.raw_next = stream.raw_words.size();
    }

    void finish_stream(Stream& stream, uint64_t index) {
        const size_t start = body_.size();
        append(stream.run.state, stream.layout.states);
        append(stream.raw_words.data(), stream.layout.raw);
        const auto word_count = static_cast<size_t>(stream.words_end - stream.run.words);
        append(stream.run.words, 2 * word_count);
        std::reverse(stream.escapes.begin(), stream.escapes.end());
        append(stream.escapes.data(), stream.escapes.size());
        body_.resize(body_.size() + (-(body_.size() - start) & 3));
        put_u32(4 + 8 * index, word_count);
        put_u32(8 + 8 * index, stream.escapes.size());
    }

    // The steps before `end`. Blocks end where their place ends, so that one block has one number of
    // active lanes.
    void read_block(Stream& stream) {
        const uint64_t place_begin = stream.end - 1 - (stream.end - 1) % coding_.shape.channels;
        uint64_t begin = std::max(stream.layout.begin_step, place_begin);
        if (stream.end - begin > kBlockSteps) begin = stream.end - kBlockSteps;
        const size_t steps = stream.end - begin;
        stream.end = begin;
        stream.left = steps;
        const BlockRows rows(coding_.shape, begin);
        stream.run.lanes = rows.lanes;
        const auto gather = [&](const uint8_t* matrix, Block& block) {
            kernels().gather(matrix + rows.begin, rows.stride, rows.lanes, steps, block.bytes);
        };
        gather(symbols_, stream.block);
        if (coding_.contexts) gather(coding_.contexts, stream.contexts);
        bool sound = true;
        if (coding_.shifts.empty() && !coding_.tables.any_escape()) {
            sound = coding_.dropped || largest_of({stream.block.bytes, steps * kLanes}) < kMaxAlphabet;
        } else {
            const uint64_t channel = begin % coding_.shape.channels;
            const uint16_t* const models = coding_.models_at(begin);
            for (size_t step = steps; step-- > 0;)
                sound &= split_step(stream, shift_of(channel + step), models[step],
                                    &stream.block.bytes[step * kLanes]);
        }
        if (!sound) refuse_first();
        if (!coding_.rotations.empty()) {
            uint8_t offsets[kBlockSteps];
            const uint8_t* const of = &coding_.rotations[begin % coding_.shape.channels];
            for (size_t i = 0; i < steps; ++i)
                offsets[i] = static_cast<uint8_t>(kMaxAlphabet - of[i]);
            kernels().symbol_rows.turn_block(offsets, coding_.dropped, steps, stream.block.bytes);
        }
    }

    unsigned shift_of(uint64_t channel) const {
        return coding_.shifts.empty() ? 0 : coding_.shifts[channel];
    }

    // Replaces the symbols of a step by coded values and sets raw bits and escape bytes apart, from
    // the end to the beginning as everything here. Returns false if one cannot be coded; whether
    // its model has a frequency for the value is left to the kernel.
    bool split_step(Stream& stream, unsigned shift, size_t model, uint8_t* symbols) const {
        const unsigned escape = coding_.tables.escape(model);
        const unsigned largest = largest_of({symbols, kLanes}) >> shift;
        if (shift) {
            stream.raw_next -= shift;
            split_low_bits(symbols, shift, &stream.raw_words[stream.raw_next]);
        }
        if (escape != kNoEscape && largest >= escape) {
            for (unsigned lane = stream.run.lanes; lane-- > 0;) {
                if (symbols[lane] < escape) continue;
                stream.escapes.push_back(static_cast<uint8_t>(symbols[lane] - escape));
                symbols[lane] = static_cast<uint8_t>(escape);
            }
            return true;
        }
        return largest < kMaxAlphabet;
    }

    // Finds the first symbol in row order that cannot be coded: the slow path of an error.
    [[noreturn]] void refuse_first() const {
        const Shape& shape = coding_.shape;
        for (uint64_t token = 0; token < shape.tokens; ++token) {
            for (uint64_t channel = 0; channel < shape.channels; ++channel) {
                const uint64_t step = token % shape.places() * shape.channels + channel;
                const uint64_t at = token * shape.channels + channel;
                const size_t context = coding_.contexts ? coding_.contexts[at] : 0;
                const size_t model = *coding_.models_at(step) + context;
                const unsigned symbol = symbols_[at];
                const unsigned coded =
                    std::min<unsigned>(symbol >> shift_of(channel), coding_.tables.escape(model));
                if (coded >= kMaxAlphabet || !inverse_[model].freq[coded])
                    throw Error(ErrorKind::Config,
                                "symbol of token " + std::to_string(token) + ", channel " +
                                    std::to_string(channel),
                                std::to_string(symbol),
                                "a value that model " + std::to_string(model) + " can code");
            }
        }
        throw std::logic_error("a symbol that could not be coded is gone");
    }

    const uint8_t* symbols_;
    const Coding& coding_;
    uint64_t stream_steps_;
    RawCounter raw_;
    const InverseTable* inverse_;
    AlignedVector<uint16_t>& words_;
    std::array<Stream, kGroupStreams>& streams_;
    std::vector<uint8_t>& body_;
};

SegmentEncoder::SegmentEncoder() : memory_(std::make_unique<Memory>()) {}
SegmentEncoder::~SegmentEncoder() = default;

std::span<const uint8_t> SegmentEncoder::encode(const uint8_t* symbols, const Coding& coding,
                                                uint64_t stream_steps) {
    if (coding.shape.steps() == 0) return {};
    Work(*memory_, symbols, coding, stream_steps).encode();
    return memory_->body;
}

std::vector<uint8_t> encode_segment(const uint8_t* symbols, const Coding& coding,
                                    uint64_t stream_steps) {
    check_coding(coding, ErrorKind::Config);
    if (coding.shape.steps() == 0) return {};
    if (coding.contexts) {
        const uint64_t size = coding.shape.tokens * coding.shape.channels;
        if (largest_of({coding.contexts, size}) > 1)
            throw Error(ErrorKind::Config, "context", "2 or more", "0 or 1");
    }
    SegmentEncoder encoder;
    const auto body = encoder.encode(symbols, coding, stream_steps);
    return {body.begin(), body.end()};
}

}  // namespace cachegen
