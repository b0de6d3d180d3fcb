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
constexpr unsigned kMostLength = 7;  // bits of a magnitude behind its first

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

    struct Symbol {
        uint64_t gap_high, gap_low, is_positive, length, magnitude;
    };

    // A whole symbol. Nearly all fit one window, which is read once then.
    Symbol symbol(unsigned low_bits) {
        const uint64_t window = ahead();
        if (at_ / 8 + sizeof window <= bytes_.size() && window) [[likely]] {
            const auto high = static_cast<unsigned>(std::countr_zero(window));
            const unsigned fixed = high + 1 + low_bits;
            if (fixed + kMostSymbolBits <= kWindow) [[likely]] {
                const uint64_t low = (window >> (high + 1)) & ((uint64_t{1} << low_bits) - 1);
                const uint64_t rest = window >> fixed;
                const auto length = static_cast<unsigned>(std::countr_zero(rest >> 1 | 256));
                const uint64_t magnitude =
                    uint64_t{1} << length | ((rest >> (length + 2)) & ((1u << length) - 1));
                at_ += fixed + 2 + 2 * length;
                return {high, low, rest & 1, length, magnitude};
            }
        }
        Symbol one{};
        one.gap_high = unary();
        one.gap_low = bits(low_bits);
        one.is_positive = bits(1);
        one.length = unary();
        // What is longer is refused.
        if (one.length <= kMostLength)
            one.magnitude = uint64_t{1} << one.length | bits(static_cast<unsigned>(one.length));
        return one;
    }

    void finish() const {
        if (at_ > 8 * bytes_.size()) refuse("bits", 8 * bytes_.size(), "more");
        if (bytes_.size() != ceil_div(at_, 8)) refuse("bytes", bytes_.size(), "none left over");
        if (at_ % 8 && bytes_.back() >> at_ % 8) refuse("padding", bytes_.back(), "zero bits");
    }

private:
    static constexpr unsigned kWindow = 56;  // so many bits of a window count
    static constexpr unsigned kMostSymbolBits = 18;  // a sign, 8 for a length, 7 and some

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
    uint64_t token_place = 0, token_place_end = shape.channels;  // of steps
    unsigned lanes = shape.steps() ? shape.active_lanes(0) : 0;
    for (uint32_t i = 0; i < count; ++i, ++place) {
        const auto one = reader.symbol(low_bits);
        if (one.gap_high > end >> low_bits) refuse("gap", one.gap_high, "one within the matrix");
        place += one.gap_high << low_bits | one.gap_low;
        if (one.length > kMostLength) refuse("bits of a magnitude", one.length, "0 to 7");
        const uint64_t symbol = 2 * one.magnitude - 1 + one.is_positive;
        if (symbol > largest) refuse("symbol", symbol, "0 to " + std::to_string(largest));
        const uint64_t step = place / kLanes;
        const auto lane = static_cast<uint8_t>(place % kLanes);
        if (step >= shape.steps()) refuse("place", place, "a token's");
        while (step >= token_place_end) {
            lanes = shape.active_lanes(++token_place);
            token_place_end += shape.channels;
        }
        if (lane >= lanes) refuse("place", place, "a token's");
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
