// One rANS stream on its way from bytes to coded values: where its parts lie, and the checks that
// FORMAT.md demands at its beginning and its end.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "dispatch.h"
#include "error.h"
#include "segment_layout.h"

namespace cachegen {

class StreamReader {
public:
    DecodeRun run{};

    // body: the segment that `stream` was parsed from, so that all its parts lie within.
    void open(std::span<const uint8_t> body, const StreamLayout& stream, uint64_t index) {
        index_ = index;
        lanes_ = stream.lanes;
        const uint8_t* at = body.data() + stream.offset;
        std::memcpy(run.state, at, stream.states);
        for (unsigned lane = 0; lane < lanes_; ++lane)
            if (run.state[lane] < kStateMin)
                refuse("first state of lane " + std::to_string(lane),
                       std::to_string(run.state[lane]), "2^16 or more");
        raw_ = at += stream.states;
        run.words = at += stream.raw;
        run.words_end = at += stream.words;
        run.starved = false;
        escapes_ = run.words_end;
        escapes_end_ = at += stream.escapes;
        if (static_cast<size_t>(body.data() + body.size() - run.words_end) < kWordSlack) {
            copy_.assign(run.words, run.words_end);
            copy_.resize(stream.words + kWordSlack);
            run.words = copy_.data();
            run.words_end = run.words + stream.words;
        }
        if (std::any_of(at, at + stream.padding, [](uint8_t byte) { return byte != 0; }))
            refuse("padding", "a non-zero byte", "zeros");
    }

    // After every block: whether a lane missed a word.
    void check_words() const {
        if (run.starved) refuse("renormalisation words", "too few", "one more");
    }

    // The value behind an escape index.
    uint8_t next_escaped(unsigned escape, uint64_t step) {
        if (escapes_ == escapes_end_) refuse("escape bytes", "too few", "one more");
        const unsigned value = escape + *escapes_++;
        if (value > kMaxSymbol) refuse_symbol(step, value);
        return static_cast<uint8_t>(value);
    }

    // The raw words of a step: `count` bit-planes.
    void next_planes(uint32_t* planes, unsigned count) {
        std::memcpy(planes, raw_, 4 * count);
        raw_ += 4 * count;
    }

    void close() const {
        if (run.words != run.words_end)
            refuse("renormalisation words",
                   std::to_string((run.words_end - run.words) / 2) + " left over",
                   "none left over");
        if (escapes_ != escapes_end_)
            refuse("escape bytes", std::to_string(escapes_end_ - escapes_) + " left over",
                   "none left over");
        for (unsigned lane = 0; lane < lanes_; ++lane)
            if (run.state[lane] != kStateMin)
                refuse("last state of lane " + std::to_string(lane),
                       std::to_string(run.state[lane]), "65536");
    }

    [[noreturn]] void refuse(const std::string& what, std::string got, std::string expected) const {
        throw Error(ErrorKind::Corrupt, "rANS stream " + std::to_string(index_) + ", " + what,
                    std::move(got), std::move(expected));
    }

    [[noreturn]] void refuse_symbol(uint64_t step, unsigned got) const {
        refuse("symbol of step " + std::to_string(step), std::to_string(got), "0 to 255");
    }

private:
    uint64_t index_ = 0;  // of the stream, for messages
    unsigned lanes_ = 0;  // of the stream; run.lanes is that of the place
    std::vector<uint8_t> copy_;  // of the words of a segment's last streams, with kWordSlack
    const uint8_t* raw_ = nullptr;
    const uint8_t *escapes_ = nullptr, *escapes_end_ = nullptr;
};

}  // namespace cachegen
