// All passes of a group, side by side, to the bodies of their segments.
#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "fused_encode.h"
#include "segment_layout.h"
#include "sparse.h"

namespace cachegen {
namespace {

constexpr int kClassesPerFactor3 = 6, kLowestRow = -24, kTableRowCount = 88, kClassCount = 64;
constexpr size_t kStepsAtOnce = 32;

}  // namespace

class PassWriter::Work {
public:
    Work(PassWriter& buffers, EncodeGroup& group, GroupDigits& digits,
         const EncodeSettings& settings)
        : buffers_(buffers),
          group_(group),
          digits_(digits),
          settings_(settings),
          shape_(group.shape),
          streams_(shape_.streams(kPassStreamSteps)),
          models_(settings.passes),
          escapes_(streams_) {}

    void run() {
        const size_t size = shape_.tokens * shape_.channels;
        group_.passes.assign(settings_.passes, {EncodedPass::Kind::Rans, {}});
        if (!size) {
            group_.passes[0].kind = EncodedPass::Kind::Bytes;
            return;
        }
        find_models();
        find_sparse();
        if (!is_sparse_) set_escapes_apart();
        for (unsigned pass = first_pass(); pass < settings_.passes; ++pass) {
            buffers_.bodies_[pass].resize(4 + 8 * streams_);
            put_u32(buffers_.bodies_[pass], 0, kPassStreamSteps);
        }
        if (first_pass() < settings_.passes)
            for (uint64_t stream = 0; stream < streams_; stream += kStreamsAtOnce)
                encode_streams(stream, std::min<uint64_t>(kStreamsAtOnce, streams_ - stream));
        for (unsigned pass = first_pass(); pass < settings_.passes; ++pass)
            group_.passes[pass].body = buffers_.store_.copy(buffers_.bodies_[pass]);
        if (is_sparse_) {
            group_.passes[0] = {EncodedPass::Kind::Sparse,
                                buffers_.store_.copy(write_sparse(sparse_, shape_))};
        } else if (group_.passes[0].body.size() >= size) {
            keep_bytes();
        }
        for (unsigned pass = 1; pass < settings_.passes; ++pass)
            if (group_.passes[pass].body.size() >= size / 4) keep_packed(pass);
    }

private:
    // Of those that are entropy-coded.
    unsigned first_pass() const { return is_sparse_ ? 1 : 0; }

    static void put_u32(std::vector<uint8_t>& body, size_t at, uint64_t value) {
        const auto low = static_cast<uint32_t>(value);
        std::memcpy(body.data() + at, &low, sizeof low);
    }

    static void copy_reversed(const uint16_t* words, size_t count, uint8_t* out) {
        constexpr size_t kAtOnce = 64;  // in a loop that compilers vectorise
        uint16_t turned[kAtOnce];
        for (; count >= kAtOnce; count -= kAtOnce, out += sizeof turned) {
            for (size_t i = 0; i < kAtOnce; ++i) turned[i] = words[count - 1 - i];
            std::memcpy(out, turned, sizeof turned);
        }
        for (; count > 0; --count, out += sizeof words[0])
            std::memcpy(out, &words[count - 1], sizeof words[0]);
    }

    static void append(std::vector<uint8_t>& body, const void* data, size_t size) {
        const auto* bytes = static_cast<const uint8_t*>(data);
        body.insert(body.end(), bytes, bytes + size);
    }

    void find_models() {
        for (unsigned pass = 0; pass < settings_.passes; ++pass) {
            models_[pass].resize(shape_.channels);
            const int below = static_cast<int>(settings_.passes - 1 - pass);
            for (size_t c = 0; c < shape_.channels; ++c) {
                const int both = group_.classes[c];
                const int row = both % kClassCount - kClassesPerFactor3 * below - kLowestRow;
                models_[pass][c] =
                    static_cast<uint16_t>(both / kClassCount * kTableRowCount +
                                          std::clamp(row, 0, kTableRowCount - 1));
            }
        }
    }

    // Looks for the symbols of pass 0 that are not 0, until there are too many.
    void find_sparse() {
        const uint64_t most = shape_.tokens * shape_.channels / kSparseShare;
        std::vector<size_t> some;  // channels with any
        for (size_t c = 0; c < shape_.channels; ++c)
            if (digits_.most[c]) some.push_back(c);
        for (uint64_t place = 0; place < shape_.places(); ++place)
            for (const size_t channel : some) {
                const uint64_t step = place * shape_.channels + channel;
                const uint8_t* const symbols = &digits_.symbols[step * kLanes];
                for (unsigned e = kLanes; e-- > 0;)
                    if (symbols[e])
                        sparse_.push_back({step, static_cast<uint8_t>(kLanes - 1 - e), symbols[e]});
                if (sparse_.size() > most) return;
            }
        is_sparse_ = true;
    }

    // In the order of a stream: places, channels, lanes.
    void set_escapes_apart() {
        std::vector<size_t> some;  // channels that may have any
        for (size_t c = 0; c < shape_.channels; ++c) {
            const unsigned most = digits_.most[c];
            if (most == kCoarseCounts - 2 || 2 * most >= settings_.tables.escape(models_[0][c]))
                some.push_back(c);
        }
        for (uint64_t place = 0; place < shape_.places(); ++place)
            for (const size_t channel : some) {
                const uint64_t step = place * shape_.channels + channel;
                const uint8_t escape = settings_.tables.escape(models_[0][channel]);
                uint8_t* const symbols = &digits_.symbols[step * kLanes];
                for (unsigned e = kLanes; e-- > 0;) {
                    if (symbols[e] < escape) continue;
                    escapes_[step / kPassStreamSteps].push_back(
                        static_cast<uint8_t>(symbols[e] - escape));
                    symbols[e] = escape;
                }
            }
    }

    // A stream at work, from its last step to its first.
    struct Stream {
        StreamLayout layout;
        uint64_t end;  // steps from here on are coded
        PassRun runs[kMaxPasses];
    };

    void encode_streams(uint64_t first, size_t count) {
        Stream streams[kStreamsAtOnce];
        for (size_t i = 0; i < count; ++i) start_stream(streams[i], first + i, i);
        while (true) {
            Stream* active[kStreamsAtOnce];
            size_t some = 0, steps = kStepsAtOnce;
            for (size_t i = 0; i < count; ++i) {
                Stream& stream = streams[i];
                if (stream.end == stream.layout.begin_step) continue;
                active[some++] = &stream;
                const uint64_t place = stream.end - 1 - (stream.end - 1) % shape_.channels;
                steps = std::min<size_t>(steps,
                                         stream.end - std::max(stream.layout.begin_step, place));
            }
            if (!some) break;
            encode_steps(active, some, steps);
        }
        for (size_t i = 0; i < count; ++i) finish_stream(streams[i], first + i, i);
    }

    void start_stream(Stream& stream, uint64_t index, size_t slot) {
        stream.layout = stream_shape(shape_, RawCounter(shape_, {}), kPassStreamSteps, index);
        stream.end = stream.layout.end_step;
        const size_t room = (stream.end - stream.layout.begin_step + 1) * kLanes;
        for (unsigned pass = first_pass(); pass < settings_.passes; ++pass) {
            std::fill_n(stream.runs[pass].state, kLanes, kStateMin);
            auto& words = buffers_.words_[slot][pass];
            if (words.size() < room) words.resize(room);
            stream.runs[pass].words = words.data();
        }
    }

    void encode_steps(Stream* const* streams, size_t count, size_t steps) {
        StepsJob jobs[kStreamsAtOnce];
        unsigned rounds = 0;
        for (size_t n = 0; n < count; ++n) {
            Stream& stream = *streams[n];
            stream.end -= steps;
            const uint64_t channel = stream.end % shape_.channels;
            for (size_t i = 0; i < steps && !is_sparse_; ++i)
                rounds =
                    std::max<unsigned>(rounds, settings_.tables.rounds(models_[0][channel + i]));
            for (unsigned pass = first_pass(); pass < settings_.passes; ++pass)
                stream.runs[pass].models = &models_[pass][channel];
            jobs[n] = {&digits_.codes[stream.end * kLanes], &digits_.symbols[stream.end * kLanes],
                       steps, shape_.active_lanes(stream.end / shape_.channels),
                       settings_.passes - 1, 0, settings_.tables.coarse(),
                       settings_.tables.refine(), stream.runs};
        }
        for (size_t n = 0; n < count; ++n) jobs[n].rounds = rounds;
        kernels().encode_rows.encode_steps(jobs, count);
    }

    void finish_stream(unsigned pass, const StreamLayout& stream, PassRun& run,
                       const uint16_t* words, uint64_t index) {
        std::vector<uint8_t>& body = buffers_.bodies_[pass];
        const size_t start = body.size();
        std::reverse(run.state, run.state + kLanes);
        append(body, run.state, stream.states);
        const auto count = static_cast<size_t>(run.words - words);
        const size_t at = body.size();
        body.resize(at + 2 * count);
        copy_reversed(words, count, body.data() + at);
        if (pass == 0) append(body, escapes_[index].data(), escapes_[index].size());
        put_u32(body, 8 + 8 * index, pass == 0 ? escapes_[index].size() : 0);
        put_u32(body, 4 + 8 * index, count);
        body.resize(body.size() + (-(body.size() - start) & 3));
    }

    void finish_stream(Stream& stream, uint64_t index, size_t slot) {
        for (unsigned pass = first_pass(); pass < settings_.passes; ++pass)
            finish_stream(pass, stream.layout, stream.runs[pass],
                          buffers_.words_[slot][pass].data(), index);
    }

    template <class Use>
    void for_each_value(const Use& use) const {  // use(index in the matrix, index of the digit)
        const TokenRows tokens(shape_);
        for (uint64_t t = 0; t < shape_.tokens; ++t) {
            const uint64_t place = t % shape_.places(), e = kLanes - 1 - t / shape_.places();
            for (uint64_t c = 0; c < shape_.channels; ++c)
                use(t * shape_.channels + c, (place * shape_.channels + c) * kLanes + e);
        }
    }

    // Symbols as bytes, escaped ones put together again.
    void keep_bytes() {
        std::vector<size_t> next(streams_);
        AlignedVector<uint8_t> symbols = digits_.symbols;
        for (uint64_t step = 0; step < shape_.steps(); ++step) {
            const uint8_t escape =
                settings_.tables.escape(models_[0][step % shape_.channels]);
            const uint64_t stream = step / kPassStreamSteps;
            for (unsigned e = kLanes; e-- > 0;)
                if (uint8_t& symbol = symbols[step * kLanes + e]; symbol == escape)
                    symbol = static_cast<uint8_t>(symbol + escapes_[stream][next[stream]++]);
        }
        EncodedPass& pass = group_.passes[0];
        pass.kind = EncodedPass::Kind::Bytes;
        const std::span<uint8_t> body = buffers_.store_.take(shape_.tokens * shape_.channels);
        for_each_value([&](size_t to, size_t from) { body[to] = symbols[from]; });
        pass.body = body;
    }

    void keep_packed(unsigned index) {
        EncodedPass& pass = group_.passes[index];
        const size_t plane = ceil_div(shape_.tokens * shape_.channels, 8);
        if (2 * plane > pass.body.size()) return;
        pass.kind = EncodedPass::Kind::Packed;
        const std::span<uint8_t> body = buffers_.store_.take(2 * plane);
        std::fill(body.begin(), body.end(), uint8_t{0});
        for_each_value([&](size_t to, size_t from) {
            const unsigned digit = digits_.codes[from] >> (3 * (index - 1)) & 3;
            for (size_t bit = 0; bit < 2; ++bit)
                body[bit * plane + to / 8] |= static_cast<uint8_t>((digit >> bit & 1) << to % 8);
        });
        pass.body = body;
    }

    PassWriter& buffers_;
    EncodeGroup& group_;
    GroupDigits& digits_;
    const EncodeSettings& settings_;
    Shape shape_;
    uint64_t streams_;
    std::vector<std::vector<uint16_t>> models_;    // by pass and channel
    std::vector<std::vector<uint8_t>> escapes_;    // by stream
    std::vector<SparseSymbol> sparse_;             // of pass 0, all of them if is_sparse_
    bool is_sparse_ = false;
};

void PassWriter::write(EncodeGroup& group, GroupDigits& digits, const EncodeSettings& settings) {
    Work(*this, group, digits, settings).run();
}

}  // namespace cachegen
