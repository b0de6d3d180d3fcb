// Matrices of quantised symbols on their way from bytes: packed bits, and streams of rANS blocks.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <utility>

#include "block.h"
#include "dispatch.h"
#include "error.h"
#include "raw_digits.h"
#include "segment_layout.h"
#include "stream_reader.h"

namespace cachegen {
namespace {  // of one source file

[[noreturn]] void corrupt(std::string what, std::string got, std::string expected) {
    throw Error(ErrorKind::Corrupt, std::move(what), std::move(got), std::move(expected));
}

// Bits [begin, begin + size) of each plane of a packed matrix, joined: one byte for each place.
class PackedBits {
public:
    PackedBits() = default;
    PackedBits(std::span<const uint8_t> body, unsigned bits, uint64_t count)
        : body_(body), bits_(bits), plane_(ceil_div(count, 8)) {
        if (body.size() != bits * plane_)
            corrupt("packed segment", std::to_string(body.size()),
                    std::to_string(bits * plane_));
        for (unsigned bit = 0; count % 8 && bit < bits; ++bit)
            if (body[(bit + 1) * plane_ - 1] >> count % 8)
                corrupt("packed segment", "non-zero padding", "zero bits");
    }

    PackedRow from(uint64_t begin) const { return {body_.data(), plane_, begin, bits_}; }

private:
    std::span<const uint8_t> body_;
    unsigned bits_ = 0;
    uint64_t plane_ = 0;
};

// One stream of a matrix: blocks of coded values, with their raw low bits.
class MatrixStream {
public:
    DecodeRun& run() { return reader_.run; }
    uint64_t step() const { return step_; }
    bool is_done() const { return step_ == end_; }

    void open(std::span<const uint8_t> body, const Shape& shape, const StreamLayout& stream,
              uint64_t index) {
        shape_ = shape;
        step_ = stream.begin_step;
        end_ = stream.end_step;
        reader_.open(body, stream, index);
    }

    // Steps that can be decoded at once: they are at one place and fit the block.
    size_t steps_ahead() const {
        const uint64_t place_end = (step_ / shape_.channels + 1) * shape_.channels;
        return std::min<uint64_t>(std::min(end_, place_end) - step_, kBlockSteps);
    }

    void begin_block(const uint16_t* models) {
        run().models = models + step_ % shape_.channels;
        run().symbols = block_.bytes;
        run().lanes = shape_.active_lanes(step_ / shape_.channels);
    }

    uint8_t* end_words() {
        reader_.check_words();
        return block_.bytes;
    }

    // Returns the largest symbol.
    unsigned add_raw(size_t steps, unsigned shift) {
        for (size_t i = 0; i < steps; ++i)
            add_raw_digits(reader_, &block_.bytes[i * kLanes], shift, run().lanes, step_ + i);
        return largest_of({block_.bytes, steps * kLanes});
    }

    void advance(size_t steps) {
        step_ += steps;
        if (is_done()) reader_.close();
    }

private:
    Shape shape_;
    uint64_t step_ = 0, end_ = 0;
    StreamReader reader_;
    Block block_;
};

}  // namespace
}  // namespace cachegen
