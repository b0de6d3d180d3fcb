// Stand-alone fuzzing of the core, meant to be built with sanitizers (see run.sh). No Python.
//
// Deterministic: round r of a run is always the same. Every buffer that the core reads or writes
// is a heap block of exactly its size, so that AddressSanitizer sees the first byte beyond it.
//
//   cachegen_fuzz [rounds] [first round]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "dispatch.h"
#include "error.h"
#include "quantize.h"
#include "rans.h"
#include "segment_layout.h"
#include "fuzz.h"

using namespace cachegen;

namespace {

// ---- Models ------------------------------------------------------------------------------------

// Every slot belongs to one symbol, every symbol has as many slots as its frequency, and ranks
// count up from 0 in slot order; the inverse finds every slot again.
bool is_bijective(const Tables& tables, unsigned k, size_t model, const uint16_t* freqs,
                  size_t alphabet) {
    const AliasTable& alias = tables.alias(k)[model];
    const InverseTable& inverse = tables.inverse(k)[model];
    const unsigned width = kTotal / k;
    unsigned next_rank[32] = {};
    for (unsigned slot = 0; slot < kTotal; ++slot) {
        const unsigned bucket = slot / width;
        const unsigned part = bucket + (slot >= alias.threshold[bucket] ? k : 0);
        const unsigned symbol = alias.symbol[part];
        const auto rank = static_cast<uint16_t>(slot + alias.bias[part]);
        if (symbol >= alphabet || rank != next_rank[symbol]++) return false;
        const unsigned position = inverse.first[symbol] + rank;
        const uint16_t* begin = inverse.part_begin;
        const auto index = std::upper_bound(begin, begin + 64, position) - begin - 1;
        if (static_cast<uint16_t>(position + inverse.part_shift[index]) != slot) return false;
    }
    return std::equal(freqs, freqs + alphabet, next_rank);
}

// ---- Segments ----------------------------------------------------------------------------------

// A random segment with everything that its Coding only views.
struct Segment {
    Exact<uint16_t> models;
    Exact<uint8_t> shifts, symbols, contexts;
    std::unique_ptr<Tables> tables;
    Shape shape;
    bool per_place, with_contexts;
    uint64_t stream_steps;

    Coding coding() const {
        return {shape,         *tables, models.view(), per_place,
                shifts.view(), with_contexts ? contexts.data.get() : nullptr};
    }
    std::vector<uint8_t> encode(const uint8_t* from, uint64_t steps) const {
        return encode_segment(from, coding(), steps);
    }
};

Segment random_segment(Random& random, uint64_t round) {
    const bool with_contexts = random.one_in(3);
    const size_t alphabet = 2 + random.below(with_contexts ? 3 : 31);
    const size_t count = 1 + with_contexts + random.below(6);
    Exact<uint16_t> freqs(count * alphabet);
    Exact<uint8_t> escapes(random.one_in(2) && !with_contexts ? count : 0);
    for (size_t n = 0; n < count; ++n) {
        size_t size = alphabet;
        if (escapes.size) {
            escapes.data[n] = static_cast<uint8_t>(
                random.one_in(3) ? kNoEscape : 1 + random.below(alphabet - 1));
            size = std::min<size_t>(alphabet, escapes.data[n] + size_t{1});
        }
        random_freqs(random, &freqs.data[n * alphabet], size);
    }
    auto tables = std::make_unique<Tables>(freqs.view(), escapes.view(), count, alphabet);
    const unsigned buckets = with_contexts ? kContextBuckets : tables->buckets();
    for (size_t n = 0; n < count; ++n)
        check(is_bijective(*tables, buckets, n, &freqs.data[n * alphabet], alphabet),
              "alias table", round);

    const Shape shape{random.below(3) ? 1 + random.below(80) : random.below(3),
                      random.below(random.one_in(8) ? 160 : 9)};
    const bool per_place = random.one_in(2);
    Exact<uint16_t> models(per_place ? shape.steps() : shape.channels);
    for (uint16_t& model : std::span(models.data.get(), models.size))
        model = static_cast<uint16_t>(random.below(count - with_contexts));
    Exact<uint8_t> shifts(random.one_in(2) && !with_contexts ? shape.channels : 0);
    for (uint8_t& shift : std::span(shifts.data.get(), shifts.size))
        shift = static_cast<uint8_t>(random.below(kMaxShift + 1));

    Segment segment{std::move(models), std::move(shifts),
                    Exact<uint8_t>(shape.tokens * shape.channels),
                    Exact<uint8_t>(shape.tokens * shape.channels), std::move(tables),
                    shape, per_place, with_contexts,
                    1 + random.below(random.one_in(4) ? kMaxStreamSteps : 200)};
    const Coding coding = segment.coding();
    for (uint64_t token = 0; token < shape.tokens; ++token) {
        for (uint64_t channel = 0; channel < shape.channels; ++channel) {
            const uint64_t step = token % shape.places() * shape.channels + channel;
            const size_t at = token * shape.channels + channel;
            segment.contexts.data[at] = with_contexts && random.one_in(3);
            const size_t n = *coding.models_at(step) + size_t{segment.contexts.data[at]};
            const unsigned shift = coding.shifts.empty() ? 0 : coding.shifts[channel];
            // A few draws, then whatever was drawn last: some segments cannot be coded.
            uint8_t symbol = 0;
            for (int draw = 0; draw < 100; ++draw) {
                symbol = static_cast<uint8_t>(random.below(256));
                if (draw % 2) symbol = static_cast<uint8_t>(random.below(alphabet) << shift);
                const unsigned value = std::min<unsigned>(
                    symbol >> shift, escapes.size ? escapes.data[n] : kNoEscape);
                if (value < alphabet && freqs.data[n * alphabet + value]) break;
            }
            segment.symbols.data[at] = symbol;
        }
    }
    return segment;
}

// The decoded matrix, or nothing if the body was refused with a named error.
std::optional<Exact<uint8_t>> try_decode(const Segment& segment, const Exact<uint8_t>& body) {
    Exact<uint8_t> out(segment.symbols.size);
    try {
        decode_segment(body.view(), segment.coding(), 0, ~uint64_t{0}, out.data.get());
    } catch (const Error&) {
        return std::nullopt;
    }
    return out;
}

// A body must be refused or be the very body of the matrix that it decodes to.
void check_damaged(const Segment& segment, const std::vector<uint8_t>& bytes, uint64_t round) {
    const auto symbols = try_decode(segment, Exact<uint8_t>(bytes));
    if (!symbols) return check(true, "", round);
    uint32_t stream_steps = 1;
    if (bytes.size() >= 4) std::memcpy(&stream_steps, bytes.data(), 4);
    const Exact<uint8_t> again(segment.encode(symbols->data.get(), stream_steps));
    check(again == Exact<uint8_t>(bytes), "an accepted body is not canonical", round);
}

void damage(Random& random, std::vector<uint8_t>& body, size_t streams) {
    if (body.empty()) body.resize(random.below(20));
    if (body.empty()) return;
    const auto put_u32 = [&](size_t at, uint64_t value) {
        const auto low = static_cast<uint32_t>(value);
        if (at + 4 <= body.size()) std::memcpy(body.data() + at, &low, 4);
    };
    const uint64_t sizes[] = {0, 1, 2, random.below(100), 1u << 24, 1u << 31, ~uint32_t{0}};
    switch (random.below(7)) {
        case 0: body.resize(random.below(body.size())); break;
        case 1: body.resize(body.size() + 1 + random.below(9)); break;
        case 2: put_u32(0, sizes[random.below(std::size(sizes))]); break;
        case 3:
            put_u32(4 + 4 * random.below(2 * streams + 1), sizes[random.below(std::size(sizes))]);
            break;
        case 4: body[random.below(body.size())] = static_cast<uint8_t>(random.bits()); break;
        case 5: {  // everything behind the directory
            for (size_t i = std::min(body.size(), 4 + 8 * streams); i < body.size(); ++i)
                body[i] = static_cast<uint8_t>(random.bits());
            break;
        }
        default: body[random.below(body.size())] ^= static_cast<uint8_t>(1u << random.below(8));
    }
    if (random.one_in(3)) damage(random, body, streams);
}

void fuzz_segment(Random& random, uint64_t round) {
    const Segment segment = random_segment(random, round);
    std::vector<uint8_t> body;
    try {
        body = segment.encode(segment.symbols.data.get(), segment.stream_steps);
    } catch (const Error& error) {
        check(error.kind == ErrorKind::Config, "encoding failed in an unexpected way", round);
        return;
    }
    const auto decoded = try_decode(segment, Exact<uint8_t>(body));
    check(decoded && *decoded == segment.symbols, "round trip", round);

    const size_t streams = parse_layout(body, segment.shape, segment.shifts.view()).size();
    Exact<uint8_t> joined(segment.symbols.size);
    for (size_t k = 0; k < streams; ++k)
        decode_segment(Exact<uint8_t>(body).view(), segment.coding(), k, 1, joined.data.get());
    check(joined == segment.symbols, "streams one by one", round);

    if (round % 16 == 0)
        for (size_t size = 0; size < body.size(); ++size)
            check(!try_decode(segment, Exact<uint8_t>({body.begin(), body.begin() + (long)size})),
                  "a truncated body was accepted", round);
    if (round % 16 == 1)
        for (size_t bit = 0; bit < 8 * body.size(); ++bit) {
            body[bit / 8] ^= static_cast<uint8_t>(1u << bit % 8);
            check_damaged(segment, body, round);
            body[bit / 8] ^= static_cast<uint8_t>(1u << bit % 8);
        }
    for (int i = 0; i < 20; ++i) {
        std::vector<uint8_t> damaged = body;
        damage(random, damaged, streams);
        check_damaged(segment, damaged, round);
    }
}

void fuzz_tables(Random& random, uint64_t round) {
    const size_t alphabet = random.below(35), count = random.below(4);
    Exact<uint16_t> freqs(alphabet * count);
    Exact<uint8_t> escapes(random.one_in(2) ? count : 0);
    for (size_t n = 0; n < count; ++n) {
        if (alphabet) random_freqs(random, &freqs.data[n * alphabet], alphabet);
        if (escapes.size) escapes.data[n] = static_cast<uint8_t>(random.below(256));
    }
    if (freqs.size && random.one_in(2))
        freqs.data[random.below(freqs.size)] = static_cast<uint16_t>(random.bits());
    try {
        const Tables tables(freqs.view(), escapes.view(), count, alphabet);
        for (size_t n = 0; n < count; ++n)
            check(is_bijective(tables, tables.buckets(), n, &freqs.data[n * alphabet], alphabet),
                  "tables", round);
    } catch (const Error& error) {
        check(error.kind == ErrorKind::Corrupt, "tables failed in an unexpected way", round);
    }
}

// ---- Quantiser ---------------------------------------------------------------------------------

void fuzz_quantize(Random& random, uint64_t round) {
    const auto type = static_cast<KVType>(random.below(kKVTypes));
    const int64_t width = type == KVType::Float32 ? 4 : 2;
    const auto tokens = static_cast<int64_t>(random.below(6));
    const auto heads = static_cast<int64_t>(random.below(4));
    const auto dim = static_cast<int64_t>(random.below(40));
    const auto levels = static_cast<unsigned>(1 + random.below(127));
    const bool per_head = random.one_in(2);

    // Rows in (T, H) or (H, T) order, perhaps backwards.
    const auto rows = tokens * heads, row_size = width * dim;
    Exact<std::byte> values(static_cast<size_t>(rows * row_size)), copy(values.size);
    const bool heads_first = random.one_in(2), backwards = random.one_in(2) && rows;
    const int64_t sign = backwards ? -1 : 1;
    const int64_t first = backwards ? (rows - 1) * row_size : 0;
    const int64_t token_stride = sign * row_size * (heads_first ? 1 : heads);
    const int64_t head_stride = sign * row_size * (heads_first ? tokens : 1);

    // Mostly small exponents; now and then any bits at all, NaN and infinity among them.
    const bool wild = random.one_in(8);
    for (size_t i = 0; i + static_cast<size_t>(width) <= values.size;
         i += static_cast<size_t>(width)) {
        auto bits = static_cast<uint32_t>(random.bits());
        if (!wild)
            bits &= type == KVType::Float16    ? 0xbbffu
                    : type == KVType::BFloat16 ? 0xbfffu
                                               : 0xbfffffffu;
        std::memcpy(values.data.get() + i, &bits, static_cast<size_t>(width));
    }
    Exact<uint8_t> symbols(static_cast<size_t>(rows * dim));
    Exact<std::byte> scales(static_cast<size_t>(tokens * (per_head ? heads : 1) * width));
    const auto bytes = values.data.get() + first;
    try {
        quantize({bytes, type, tokens, heads, dim, token_stride, head_stride}, levels, per_head,
                 symbols.data.get(), scales.data.get());
        const bool in_range = std::all_of(symbols.view().begin(), symbols.view().end(),
                                          [&](uint8_t symbol) { return symbol <= 2 * levels; });
        check(in_range, "symbol beyond 2 * levels", round);
    } catch (const Error& error) {
        check(wild && error.kind == ErrorKind::NonFinite, "quantize refused sound values", round);
    }
    if (random.one_in(2))
        for (uint8_t& symbol : std::span(symbols.data.get(), symbols.size))
            symbol = static_cast<uint8_t>(random.bits());
    if (random.one_in(4) && scales.size)
        scales.data[random.below(scales.size)] = static_cast<std::byte>(random.bits());
    try {
        dequantize(symbols.data.get(), scales.data.get(), per_head, levels,
                   {copy.data.get() + first, type, tokens, heads, dim, token_stride, head_stride});
        check(true, "", round);
    } catch (const Error& error) {
        check(error.kind == ErrorKind::Corrupt, "dequantize failed unexpectedly", round);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4000;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    for (const Kernels* backend : backends()) {
        if (!backend->is_available()) continue;
        select_isa(backend->isa);
        for (uint64_t round = first; round < first + rounds; ++round) {
            Random random(round);
            fuzz_segment(random, round);
            fuzz_tables(random, round);
            for (int i = 0; i < 5; ++i) fuzz_quantize(random, round);
            if (round % 16 == 0) fuzz_fused(random, round);
            if (round % 8 == 0) fuzz_encode(random, round);
            if (round % 2 == 0) fuzz_planes(random, round);
            if (round % 4 == 1) fuzz_lossless(random, round);
        }
    }
    std::printf("%u passed, %u failed\n", passed, failed);
    return failed != 0;
}
