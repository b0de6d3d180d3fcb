#include "sparse.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "error.h"

namespace cachegen {
namespace {

constexpr size_t kHeader = 5;  // count (u32), low bits of a gap (u8)
constexpr unsigned kMostLowBits = 40;

[[noreturn]] void refuse(const char* what, uint64_t got, std::string expected) {
    throw Error(ErrorKind::Corrupt, std::string("sparse segment, ") + what, std::to_string(got),
                std::move(expected));
}

// Bits from the lowest of the first byte on; zeros behind the end, which `finish` notices.
class BitReader {
public:
    explicit BitReader(std::span<const uint8_t> bytes) : bytes_(bytes) {}

    // Zeros before the next one, which is taken, too.
    uint64_t unary() {
        uint64_t zeros = 0;
        while (true) {
            const uint64_t window = ahead();
            const auto here = static_cast<unsigned>(std::countr_zero(window));
            if (here < kWindow) {
                at_ += here + 1;
                return zeros + here;
            }
            if (at_ > 8 * bytes_.size()) refuse("bits", 8 * bytes_.size(), "more");
            at_ += kWindow;
            zeros += kWindow;
        }
    }

    uint64_t bits(unsigned count) {
        const uint64_t value = ahead() & ((uint64_t{1} << count) - 1);
        at_ += count;
        return value;
    }

    void finish() const {
        if (at_ > 8 * bytes_.size()) refuse("bits", 8 * bytes_.size(), "more");
        if (bytes_.size() != ceil_div(at_, 8)) refuse("bytes", bytes_.size(), "none left over");
        if (at_ % 8 && bytes_.back() >> at_ % 8) refuse("padding", bytes_.back(), "zero bits");
    }

private:
    static constexpr unsigned kWindow = 56;  // so many bits of a window count

    uint64_t ahead() const {
        uint64_t window = 0;
        const uint64_t byte = at_ / 8;
        if (byte < bytes_.size())
            std::memcpy(&window, bytes_.data() + byte,
                        std::min<size_t>(sizeof window, bytes_.size() - byte));
        return window >> at_ % 8;
    }

    std::span<const uint8_t> bytes_;
    uint64_t at_ = 0;
};

class BitWriter {
public:
    explicit BitWriter(std::vector<uint8_t>& bytes) : bytes_(bytes) {}

    void bits(uint64_t value, unsigned count) {
        for (unsigned i = 0; i < count; ++i, ++at_) {
            if (at_ % 8 == 0) bytes_.push_back(0);
            bytes_.back() |= static_cast<uint8_t>((value >> i & 1) << at_ % 8);
        }
    }
    void unary(uint64_t zeros) {
        for (; zeros; --zeros) bits(0, 1);
        bits(1, 1);
    }

private:
    std::vector<uint8_t>& bytes_;
    uint64_t at_ = 0;
};

}  // namespace

std::vector<SparseSymbol> parse_sparse(std::span<const uint8_t> body, const Shape& shape,
                                       unsigned largest) {
    if (body.size() < kHeader) refuse("bytes", body.size(), "5 or more");
    uint32_t count = 0;
    std::memcpy(&count, body.data(), sizeof count);
    const unsigned low_bits = body[sizeof count];
    // Bounds what is allocated for hostile bytes.
    if (count > shape.steps()) refuse("count", count, "at most one for every step");
    if (low_bits > kMostLowBits) refuse("low bits", low_bits, "0 to 40");
    BitReader reader(body.subspan(kHeader));
    std::vector<SparseSymbol> result;
    result.reserve(count);
    const uint64_t end = shape.steps() * kLanes;
    uint64_t place = 0;  // step * kLanes + lane of the next one
    for (uint32_t i = 0; i < count; ++i, ++place) {
        const uint64_t high = reader.unary();
        if (high > end >> low_bits) refuse("gap", high, "one within the matrix");
        place += high << low_bits | reader.bits(low_bits);
        const uint64_t is_positive = reader.bits(1);
        const uint64_t length = reader.unary();
        if (length > 7) refuse("bits of a magnitude", length, "0 to 7");
        const uint64_t magnitude =
            uint64_t{1} << length | reader.bits(static_cast<unsigned>(length));
        const uint64_t symbol = 2 * magnitude - 1 + is_positive;
        if (symbol > largest) refuse("symbol", symbol, "0 to " + std::to_string(largest));
        const uint64_t step = place / kLanes;
        const auto lane = static_cast<uint8_t>(place % kLanes);
        if (step >= shape.steps() || lane >= shape.active_lanes(step / shape.channels))
            refuse("place", place, "a token's");
        result.push_back({step, lane, static_cast<uint8_t>(symbol)});
    }
    reader.finish();
    return result;
}

std::vector<uint8_t> write_sparse(std::span<const SparseSymbol> symbols, const Shape& shape) {
    const auto count = static_cast<uint32_t>(symbols.size());
    // 0.69 of the mean gap, rounded down to a power of two.
    const uint64_t typical = shape.steps() * kLanes * 11 / (16 * (uint64_t{count} + 1));
    const unsigned low_bits = typical ? static_cast<unsigned>(std::bit_width(typical)) - 1 : 0;
    std::vector<uint8_t> body(kHeader);
    std::memcpy(body.data(), &count, sizeof count);
    body[sizeof count] = static_cast<uint8_t>(low_bits);
    BitWriter writer(body);
    uint64_t next = 0;
    for (const SparseSymbol& one : symbols) {
        const uint64_t place = one.step * kLanes + one.lane, gap = place - next;
        const unsigned magnitude = (one.symbol + 1u) / 2;
        const auto length = static_cast<unsigned>(std::bit_width(magnitude)) - 1;
        writer.unary(gap >> low_bits);
        writer.bits(gap, low_bits);
        writer.bits(one.symbol % 2 == 0, 1);
        writer.unary(length);
        writer.bits(magnitude, length);
        next = place + 1;
    }
    return body;
}

}  // namespace cachegen
