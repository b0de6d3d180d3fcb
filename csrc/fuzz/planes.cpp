// Fuzzing of whole planes of `int8` and `cachegen`: sound ones decode to what segment and quantiser
// give one after the other, damaged ones are refused or decode to anything, within their memory.
#include <cstring>
#include <vector>

#include "channel_models.h"
#include "error.h"
#include "fuzz.h"
#include "plane_decode.h"
#include "plane_encode.h"
#include "quantize.h"
#include "rans.h"

namespace cachegen {
namespace {

// A table set as the frozen one is: 32 symbols.
const Tables& shared_tables() {
    static const Tables tables = [] {
        Random random(7);
        std::vector<uint16_t> freqs(5 * kMaxAlphabet);
        for (size_t n = 0; n < 5; ++n) random_freqs(random, &freqs[n * kMaxAlphabet], kMaxAlphabet);
        return Tables(freqs, {}, 5, kMaxAlphabet);
    }();
    return tables;
}

// One pass with everything that its source only views.
struct Pass {
    Exact<uint8_t> body, freqs, classes, rotations, low, scales;
    MatrixSource source{};

    explicit Pass(size_t scales_size)
        : body(0), freqs(0), classes(0), rotations(0), low(0), scales(scales_size) {}

    const MatrixSource& view() {
        source.body = body.view();
        source.freqs = freqs.view();
        source.classes = classes.view();
        source.rotations = rotations.view();
        source.low = low.view();
        source.scales = scales.view();
        return source;
    }
};

Pass random_pass(Random& random, uint64_t rows, size_t heads, size_t dim, KVType stored) {
    const size_t width = heads * dim, element = stored == KVType::Float32 ? 4 : 2;
    const bool per_head = random.one_in(2);
    Pass pass(rows * (per_head ? heads : 1) * element);
    // Small exponents: sound scales; now and then anything.
    for (uint8_t& byte : std::span(pass.scales.data.get(), pass.scales.size))
        byte = static_cast<uint8_t>(random.bits() & (random.one_in(400) ? 0xff : 0x3f));
    pass.source.rows = rows;
    pass.source.per_head = per_head;
    pass.source.levels = static_cast<unsigned>(1 + random.below(127));
    while (2 * pass.source.levels >> pass.source.shift >= kMaxAlphabet) ++pass.source.shift;
    pass.source.alphabet = (2 * pass.source.levels >> pass.source.shift) + 1;
    std::vector<uint8_t> symbols(rows * width);
    for (uint8_t& symbol : symbols)
        symbol = static_cast<uint8_t>(random.below(2 * pass.source.levels + 1));
    switch (random.below(3)) {
        case 0:
            pass.source.kind = MatrixKind::Bytes;
            pass.body = Exact<uint8_t>(symbols);
            return pass;
        case 1:
            pass.source.kind = MatrixKind::Packed;
            pass.source.shift = 0;
            pass.source.bits = static_cast<unsigned>(1 + random.below(8));
            pass.body = Exact<uint8_t>(pass.source.bits * ceil_div(rows * width, 8));
            for (uint8_t& byte : std::span(pass.body.data.get(), pass.body.size))
                byte = static_cast<uint8_t>(random.bits());
            return pass;
        default: pass.source.kind = MatrixKind::Rans;
    }
    std::vector<uint32_t> counts(width * pass.source.alphabet);
    std::vector<uint16_t> freqs(counts.size());
    std::vector<double> bits(kTotal + 1, 1.0);
    count_symbols({rows, width, symbols.data()}, pass.source.shift, pass.source.alphabet,
                  counts.data());
    normalize_counts(counts, pass.source.alphabet, bits, freqs.data());
    pass.freqs = Exact<uint8_t>(2 * freqs.size());
    if (!freqs.empty()) std::memcpy(pass.freqs.data.get(), freqs.data(), pass.freqs.size);
    std::vector<uint16_t> models(width);
    std::vector<uint8_t> shifts(width, static_cast<uint8_t>(pass.source.shift));
    for (size_t c = 0; c < width; ++c) models[c] = static_cast<uint16_t>(c);
    const Tables tables(freqs, {}, width, pass.source.alphabet);
    const Coding coding{{rows, width}, tables, models, false, shifts};
    pass.body = Exact<uint8_t>(encode_segment(symbols.data(), coding, 1 + random.below(300)));
    return pass;
}

void damage(Random& random, Pass& pass) {
    const auto flip = [&](Exact<uint8_t>& bytes) {
        if (bytes.size) bytes.data[random.below(bytes.size)] = static_cast<uint8_t>(random.bits());
    };
    switch (random.below(8)) {
        case 0: return flip(pass.body);
        case 1: return flip(pass.freqs);
        case 2: return flip(pass.scales);
        case 3: {
            const auto body = pass.body.view();
            pass.body = Exact<uint8_t>(std::vector<uint8_t>(
                body.begin(), body.begin() + static_cast<long>(random.below(body.size() + 1))));
            return;
        }
        case 4: {
            const size_t width = pass.source.alphabet ? pass.freqs.size / pass.source.alphabet / 2 : 0;
            pass.freqs = Exact<uint8_t>(0);
            pass.classes = Exact<uint8_t>(width);
            pass.rotations = Exact<uint8_t>(width);
            for (size_t c = 0; c < width; ++c) {
                pass.classes.data[c] = static_cast<uint8_t>(random.below(random.one_in(9) ? 9 : 5));
                pass.rotations.data[c] = static_cast<uint8_t>(random.below(33));
            }
            return;
        }
        case 5:
            pass.source.low_bits = static_cast<unsigned>(random.below(4));
            pass.low = Exact<uint8_t>(random.below(200));
            return;
        case 6: pass.source.rows += random.below(2); return;
        default: pass.source.kind = static_cast<MatrixKind>(random.below(3));
    }
}

// What a plane is coded to decodes to what the quantiser makes of it.
void fuzz_encoding(Random& random, uint64_t round) {
    static const Tables frozen = [] {
        std::vector<uint16_t> freqs(3 * kMaxAlphabet, uint16_t{1});
        for (size_t n = 0; n < 3; ++n)
            freqs[n * kMaxAlphabet + 8 * n] = static_cast<uint16_t>(kTotal - (kMaxAlphabet - 1));
        return Tables(freqs, {}, 3, kMaxAlphabet);
    }();
    Exact<int16_t> costs(3 * kMaxAlphabet);
    for (size_t i = 0; i < costs.size; ++i) costs.data[i] = static_cast<int16_t>(random.below(12289));
    const std::vector<double> bits(kTotal + 1, 1.0);
    const auto tokens = static_cast<int64_t>(random.below(random.one_in(3) ? 300 : 40));
    const auto heads = static_cast<int64_t>(1 + random.below(3));
    const auto dim = static_cast<int64_t>(1 + random.below(random.one_in(4) ? 150 : 20));
    const auto type = static_cast<KVType>(random.below(kKVTypes));
    const auto element = static_cast<int64_t>(type == KVType::Float32 ? 4 : 2);
    const auto size = static_cast<size_t>(tokens * heads * dim);
    Exact<uint8_t> values(size * static_cast<size_t>(element));
    for (uint8_t& byte : std::span(values.data.get(), values.size))
        byte = static_cast<uint8_t>(random.bits() & (random.one_in(2000) ? 0xff : 0xbf));
    const bool is_frozen = random.one_in(2);
    const unsigned low_bits = is_frozen && random.one_in(2) ? 3 : 0;
    const bool per_head = random.one_in(2);
    const auto levels = static_cast<unsigned>(1 + random.below(127));
    const auto scale_size = static_cast<size_t>(tokens * (per_head ? heads : 1) * element);
    Exact<uint8_t> scales(scale_size), again(scale_size), symbols(size);
    const Plane<const std::byte> plane{reinterpret_cast<const std::byte*>(values.data.get()), type,
                                       tokens, heads, dim, heads * dim * element, dim * element};
    PlaneEncode work{{{plane, levels, reinterpret_cast<std::byte*>(scales.data.get())}}, per_head,
                     low_bits, is_frozen ? &frozen : nullptr, costs.view(), bits, 1};
    try {
        const EncodedPlanes found = encode_planes(work);
        quantize(plane, levels, per_head, symbols.data.get(),
                 reinterpret_cast<std::byte*>(again.data.get()));
        check(scales == again, "scales of an encoded plane are others", round);
        MatrixSource source{};
        source.rows = static_cast<uint64_t>(tokens);
        source.kind = found.planes[0].kind;
        source.bits = 5;
        source.body = found.planes[0].body;
        const std::span<const uint8_t> tables = found.planes[0].tables;
        const auto channels = static_cast<size_t>(heads * dim);
        source.low_bits = low_bits;
        if (!low_bits)
            while (2 * levels >> source.shift >= kMaxAlphabet) ++source.shift;
        if (source.kind == MatrixKind::Rans && is_frozen) {
            source.classes = tables.first(channels);
            source.rotations = tables.subspan(channels);
        } else if (source.kind == MatrixKind::Rans) {
            source.freqs = tables;
            source.alphabet = (2 * levels >> source.shift) + 1;
        }
        source.low = found.planes[0].low;
        source.levels = levels;
        source.scales = scales.view();
        source.per_head = per_head;
        Exact<std::byte> out(values.size), wanted(values.size);
        Exact<int64_t> offsets(static_cast<size_t>(tokens));
        for (int64_t t = 0; t < tokens; ++t) offsets.data[t] = t * heads * dim * element;
        const auto to = [&](Exact<std::byte>& bytes) {
            return Plane<std::byte>{bytes.data.get(), type, tokens, heads, dim,
                                    heads * dim * element, dim * element};
        };
        dequantize(symbols.data.get(), reinterpret_cast<const std::byte*>(scales.data.get()),
                   per_head, levels, to(wanted));
        PlaneDecode decode{type, type, frozen, 1, {}};
        decode.planes.push_back({static_cast<uint64_t>(tokens), 0, {source},
                                 {out.data.get(), offsets.data.get(), dim * element,
                                  static_cast<uint32_t>(heads), static_cast<uint32_t>(dim), -1, 0,
                                  false}});
        decode_planes(decode);
        check(out == wanted, "an encoded plane decodes to something else", round);
    } catch (const Error& error) {
        check(error.kind == ErrorKind::NonFinite, "a plane was not encoded", round);
    }
}

}  // namespace

void fuzz_planes(Random& random, uint64_t round) {
    const uint64_t tokens = random.below(random.one_in(4) ? 300 : 60);
    const auto heads = static_cast<uint32_t>(1 + random.below(3));
    const auto dim = static_cast<uint32_t>(1 + random.below(random.one_in(4) ? 150 : 20));
    const auto type = static_cast<KVType>(random.below(kKVTypes));
    const auto stored = random.one_in(2) ? type : static_cast<KVType>(random.below(kKVTypes));
    const auto group = static_cast<unsigned>(random.one_in(3) ? 2 + random.below(11) : 0);
    const uint64_t anchors = group ? ceil_div(tokens, group) : tokens;
    std::vector<Pass> passes;
    passes.push_back(random_pass(random, anchors, heads, dim, stored));
    if (group && random.one_in(2))
        passes.push_back(random_pass(random, tokens - anchors, heads, dim, stored));

    const int64_t row_bytes = int64_t{dim} * (type == KVType::Float32 ? 4 : 2);
    Exact<std::byte> out(static_cast<size_t>(row_bytes) * heads * tokens);
    Exact<int64_t> offsets(tokens);
    for (uint64_t t = 0; t < tokens; ++t)
        offsets.data[t] = random.one_in(20)
                              ? kSkippedToken
                              : static_cast<int64_t>(tokens - 1 - t) * heads * row_bytes;
    const auto run = [&] {
        QuantizedPlane plane{tokens, group, {}, {out.data.get(), offsets.data.get(), row_bytes,
                                                 heads, dim, -1, 0, false}};
        for (Pass& pass : passes) plane.passes.push_back(pass.view());
        PlaneDecode work{type, stored, shared_tables(), 1 + random.below(2), {}};
        work.planes.assign(1 + random.below(2), plane);
        work.threads = 1;
        decode_planes(work);
    };
    fuzz_encoding(random, round);
    for (int i = 0; i < 12; ++i) {
        try {
            run();
            check(true, "", round);
        } catch (const Error& error) {
            check(error.kind != ErrorKind::Config && error.kind != ErrorKind::NonFinite,
                  "a plane failed in an unexpected way", round);
        }
        damage(random, passes[random.below(passes.size())]);
    }
}

}  // namespace cachegen
