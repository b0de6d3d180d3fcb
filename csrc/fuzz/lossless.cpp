// Fuzzing of `lossless` planes: any bits come back as they were, damaged bytes are refused or decode
// to anything, within their memory.
#include <cmath>
#include <cstring>
#include <vector>

#include "error.h"
#include "fuzz.h"
#include "lossless.h"

namespace cachegen {
namespace {

// Channels with an exponent of their own; now and then anything.
void fill(Random& random, std::span<uint8_t> bytes, size_t width) {
    for (size_t at = 0; at < bytes.size(); at += width) {
        for (size_t i = 0; i < width; ++i) bytes[at + i] = static_cast<uint8_t>(random.bits());
        if (!random.one_in(200))
            bytes[at + width - 1] = static_cast<uint8_t>((random.bits() & 0x80) | 0x3c);
    }
}

struct Costs {
    std::vector<int16_t> bits = std::vector<int16_t>(kTotal + 1);
    std::vector<double> saved = std::vector<double>(kTotal + 1);

    Costs() {
        for (unsigned f = 1; f <= kTotal; ++f) {
            bits[f] = static_cast<int16_t>(std::lround(1024 * (12 - std::log2(f))));
            saved[f] = std::log2((f + 1.0) / f);
        }
    }
};

}  // namespace

void fuzz_lossless(Random& random, uint64_t round) {
    static const Costs costs;
    const auto type = static_cast<KVType>(random.below(kKVTypes));
    const size_t width = fields_of(type).bytes;
    const uint64_t tokens = random.below(random.one_in(4) ? 300 : 60);
    const auto heads = static_cast<uint32_t>(1 + random.below(3));
    const auto dim = static_cast<uint32_t>(1 + random.below(random.one_in(4) ? 150 : 20));
    const auto row = static_cast<int64_t>(dim * width);
    Exact<uint8_t> values(tokens * heads * dim * width), out(values.size);
    const size_t narrow = random.one_in(3) ? random.below(width) : 0;  // low bytes that are 0
    fill(random, {values.data.get(), values.size}, width);
    for (size_t at = 0; at < values.size; at += width)
        std::fill_n(values.data.get() + at, narrow, uint8_t{0});

    const Plane<const std::byte> plane{reinterpret_cast<const std::byte*>(values.data.get()), type,
                                       static_cast<int64_t>(tokens), heads, dim, heads * row, row};
    const LosslessPlane coded =
        std::move(encode_lossless(std::span(&plane, 1), {costs.bits, costs.saved}, 1).front());
    Exact<uint8_t> side(coded.side);
    // Without side information the plane is stored as it is.
    const std::vector<uint8_t> plain(values.data.get(), values.data.get() + values.size);
    Exact<uint8_t> body(side.size ? coded.body : plain);
    Exact<int64_t> offsets(tokens);
    for (uint64_t t = 0; t < tokens; ++t)
        offsets.data[t] = static_cast<int64_t>(t) * heads * row;
    const auto decode = [&](KVType to) {
        const PlaneTarget target{reinterpret_cast<std::byte*>(out.data.get()), offsets.data.get(),
                                 row, heads, dim, -1, 0, false};
        decode_lossless({to, type, 1, {{tokens, side.view(), body.view(), target}}});
    };
    decode(type);
    check(out == values, "a lossless plane came back changed", round);
    for (int i = 0; i < 12; ++i) {
        Exact<uint8_t>& part = random.one_in(2) ? side : body;
        if (random.one_in(3)) {
            const auto all = part.view();
            const auto size = static_cast<long>(random.below(part.size + 1));
            part = Exact<uint8_t>(std::vector<uint8_t>(all.begin(), all.begin() + size));
        } else if (part.size) {
            part.data[random.below(part.size)] = static_cast<uint8_t>(random.bits());
        }
        try {
            decode(type);
            check(true, "", round);
        } catch (const Error& error) {
            check(error.kind == ErrorKind::Corrupt || error.kind == ErrorKind::Truncated,
                  "a lossless plane failed in an unexpected way", round);
        }
        if (random.one_in(3)) {  // begin again
            side = Exact<uint8_t>(coded.side);
            body = Exact<uint8_t>(coded.body.empty() ? plain : coded.body);
        }
    }
}

}  // namespace cachegen
