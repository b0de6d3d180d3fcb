// Fuzzing of the fused decoder: sound groups decode to the same bits with every backend and any
// number of threads, damaged ones are refused with a named error or decode to something.
#include <cstring>
#include <optional>
#include <string>

#include "dispatch.h"
#include "error.h"
#include "fused_decode.h"
#include "fuzz.h"
#include "rans.h"
#include "sparse.h"

namespace cachegen {

// Random tables of the ladder's shape; every symbol can be coded.
const LadderTables& ladder_tables() {
    static const LadderTables all = [] {
        Random random(1);
        const size_t rows = kFamilies * kTableRows;
        std::vector<uint16_t> coarse(rows * 32), refine(2 * rows * 3);
        std::vector<uint8_t> escapes(rows);
        const auto fill = [&](uint16_t* row, size_t used) {
            unsigned left = kTotal - static_cast<unsigned>(used);
            for (size_t i = 0; i < used; ++i) row[i] = 1;
            for (size_t i = 0; i + 1 < used; ++i) {
                const auto part = static_cast<unsigned>(random.below(left + 1));
                row[i] = static_cast<uint16_t>(row[i] + part);
                left -= part;
            }
            row[used - 1] = static_cast<uint16_t>(row[used - 1] + left);
        };
        for (size_t n = 0; n < rows; ++n) {
            escapes[n] = static_cast<uint8_t>(1 + random.below(31));
            fill(&coarse[n * 32], escapes[n] + size_t{1});
        }
        for (size_t n = 0; n < 2 * rows; ++n) fill(&refine[n * 3], 3);
        return LadderTables{std::make_unique<Tables>(coarse, escapes, rows, 32),
                            std::make_unique<Tables>(refine, std::span<const uint8_t>(), 2 * rows, 3)};
    }();
    return all;
}

unsigned ladder_row(unsigned both, unsigned below) {
    const int row = static_cast<int>(both % kClasses) - 6 * static_cast<int>(below) + 24;
    return both / kClasses * kTableRows + static_cast<unsigned>(std::clamp(row, 0, 87));
}

namespace {

// A group with everything that a FusedGroup only views.
struct Group {
    uint64_t tokens = 0, channels = 0;
    uint32_t heads = 0, dim = 0;
    unsigned passes = 1;
    KVType type = KVType::Float32;
    bool with_rope = false;
    size_t half = 0;
    std::vector<PassKind> kinds;
    std::vector<Exact<uint8_t>> bodies;
    Exact<uint8_t> side{0};
    Exact<float> offsets{2 * kClasses};

    size_t width() const { return type == KVType::Float32 ? 4 : 2; }

    // The decoded bytes, or nothing if the group was refused.
    std::optional<Exact<std::byte>> decode(const std::vector<Exact<uint8_t>>& from,
                                           const Exact<uint8_t>& side_bytes, size_t threads,
                                           bool with_planes) const {
        Exact<std::byte> out(tokens * channels * width());
        const Shape shape{tokens, channels};
        Exact<float> coefficients(channels * shape.places() * kLanes);
        Exact<uint8_t> used(channels), classes(channels);
        const ComponentTarget components{coefficients.data.get(), used.data.get(), nullptr};
        Exact<int64_t> places(tokens);
        for (uint64_t t = 0; t < tokens; ++t)
            places.data[t] = t % 7 == 5 ? kSkippedToken
                                        : static_cast<int64_t>(t * channels * width());
        try {
            FusedDecode work{type, type, passes, *ladder_tables().coarse, *ladder_tables().refine,
                             threads, {}, {}};
            work.ropes.push_back({std::vector<float>(half, 0.25f), 1.5f, half % 2 == 1});
            FusedGroup group{};
            group.tokens = tokens;
            group.channels = channels;
            for (size_t j = 0; j < from.size(); ++j)
                group.passes.push_back({kinds[j], from[j].view()});
            group.key_scaling = group.value_scaling = {
                power_of_three(static_cast<unsigned>(from.size()) - 1), 0.5f, 0.25f};
            group.value_factor = 1;
            group.early_offset = offsets.view().first(kClasses);
            group.late_offset = offsets.view().last(kClasses);
            group.side = parse_side(side_bytes.view(), tokens, channels, type, true);
            if (with_planes) {
                group.planes.push_back({out.data.get(), places.data.get(),
                                        static_cast<int64_t>(dim * width()), heads, dim,
                                        with_rope ? 0 : -1, 3, false});
            } else {
                group.coefficients = &components;
            }
            work.groups = {group};
            decode_groups(work);
        } catch (const Error&) {
            return std::nullopt;
        }
        return out;
    }
};

std::vector<uint8_t> encode_pass(const Shape& shape, const std::vector<uint8_t>& symbols,
                                 const Tables& tables, const std::vector<uint16_t>& models,
                                 const uint8_t* contexts, uint64_t stream_steps) {
    const Coding coding{shape, tables, models, false, {}, contexts};
    return encode_segment(symbols.data(), coding, stream_steps);
}

// Leaves so few symbols that they may be written sparsely, and returns them.
std::vector<SparseSymbol> thin_out(Random& random, const Shape& shape,
                                   std::vector<uint8_t>& symbols) {
    std::vector<SparseSymbol> few;
    for (uint64_t step = 0; step < shape.steps(); ++step)
        for (unsigned lane = 0; lane < shape.active_lanes(step / shape.channels); ++lane) {
            const uint64_t token = lane * shape.places() + step / shape.channels;
            uint8_t& symbol = symbols[token * shape.channels + step % shape.channels];
            if (few.size() < shape.steps() && random.one_in(64) && symbol)
                few.push_back({step, static_cast<uint8_t>(lane), symbol});
            else
                symbol = 0;
        }
    return few;
}

Group random_group(Random& random) {
    Group group;
    group.tokens = 1 + random.below(90);
    group.heads = static_cast<uint32_t>(1 + random.below(3));
    group.dim = static_cast<uint32_t>(1 + random.below(random.one_in(3) ? 140 : 12));
    group.channels = uint64_t{group.heads} * group.dim;
    group.passes = static_cast<unsigned>(1 + random.below(kMaxPasses));
    group.type = static_cast<KVType>(random.below(kKVTypes));
    group.with_rope = random.one_in(2);
    group.half = random.below(group.dim / 2 + 1);
    for (float& offset : std::span(group.offsets.data.get(), group.offsets.size))
        offset = static_cast<float>(random.below(100)) * 0.01f;
    const Shape shape{group.tokens, group.channels};
    const size_t size = group.tokens * group.channels;

    const bool has_mean = random.one_in(2);
    const auto exempt = static_cast<uint16_t>(random.one_in(2) ? random.below(group.tokens + 1) : 0);
    std::vector<uint8_t> side(8);
    side[0] = static_cast<uint8_t>(random.bits());
    std::memcpy(&side[2], &exempt, 2);
    const float scale = has_mean ? 0.125f : 0.0f;
    std::memcpy(&side[4], &scale, 4);
    std::vector<uint8_t> classes(group.channels);
    for (uint8_t& both : classes)
        both = static_cast<uint8_t>(random.below(kFamilies * kClasses));
    side.insert(side.end(), classes.begin(), classes.end());
    for (size_t c = 0; has_mean && c < group.channels; ++c)
        side.push_back(static_cast<uint8_t>(random.bits()));
    for (uint32_t t = 0; t < exempt; ++t)
        for (int byte = 0; byte < 4; ++byte) side.push_back(static_cast<uint8_t>(t >> (8 * byte)));
    for (size_t i = 0; i < exempt * group.channels * group.width(); ++i)
        side.push_back(static_cast<uint8_t>(random.below(64)));
    group.side = Exact<uint8_t>(side);

    const uint64_t stream_steps = 1 + random.below(2 * group.channels);
    std::vector<uint8_t> seen(size), symbols(size);
    const unsigned present = 1 + static_cast<unsigned>(random.below(group.passes));
    for (unsigned j = 0; j < present; ++j) {
        std::vector<uint16_t> models(group.channels);
        for (size_t c = 0; c < group.channels; ++c)
            models[c] = static_cast<uint16_t>(ladder_row(classes[c], group.passes - 1 - j) *
                                              (j ? 2 : 1));
        for (uint8_t& symbol : symbols)
            symbol = static_cast<uint8_t>(
                j ? random.below(3) : random.below(random.one_in(9) ? 255 : 4));
        const bool is_sparse = j == 0 && random.one_in(3);
        std::vector<SparseSymbol> few;
        if (is_sparse) few = thin_out(random, shape, symbols);
        const uint64_t steps = random.one_in(6) ? stream_steps + 1 : stream_steps;
        std::vector<uint8_t> body;
        group.kinds.push_back(PassKind::Rans);
        if (is_sparse) {
            group.kinds.back() = PassKind::Sparse;
            body = write_sparse(few, shape);
        } else if (!random.one_in(5)) {
            const Tables& tables = j ? *ladder_tables().refine : *ladder_tables().coarse;
            body = encode_pass(shape, symbols, tables, models, j ? seen.data() : nullptr, steps);
        } else if (j == 0) {
            group.kinds.back() = PassKind::Bytes;
            body = symbols;
        } else {
            group.kinds.back() = PassKind::Packed;
            const size_t plane = (size + 7) / 8;
            body.resize(2 * plane);
            for (size_t i = 0; i < size; ++i)
                for (size_t bit = 0; bit < 2; ++bit)
                    body[bit * plane + i / 8] |=
                        static_cast<uint8_t>((symbols[i] >> bit & 1) << i % 8);
        }
        for (size_t i = 0; i < size; ++i)
            seen[i] |= static_cast<uint8_t>(j ? symbols[i] != 1 : symbols[i] != 0);
        group.bodies.emplace_back(body);
    }
    return group;
}

}  // namespace

void fuzz_fused(Random& random, uint64_t round) {
    const Group group = random_group(random);
    const auto decoded = group.decode(group.bodies, group.side, 1, true);
    check(decoded.has_value(), "a sound group was refused", round);
    if (!decoded) return;
    const auto threaded = group.decode(group.bodies, group.side, 3, true);
    check(threaded && *threaded == *decoded, "threads change the result", round);
    const std::string_view isa = kernels().isa;
    select_isa("scalar");
    const auto portable = group.decode(group.bodies, group.side, 1, true);
    select_isa(isa);
    check(portable && *portable == *decoded, "backends differ", round);
    check(group.decode(group.bodies, group.side, 1, false).has_value(), "coefficients", round);

    for (int i = 0; i < 20; ++i) {
        std::vector<Exact<uint8_t>> bodies;
        std::vector<uint8_t> side(group.side.view().begin(), group.side.view().end());
        const size_t which = random.below(group.bodies.size() + 1);
        const auto damage = [&](std::vector<uint8_t> bytes) {
            if (bytes.empty() || random.one_in(5)) {
                bytes.resize(random.below(bytes.size() + 9));
            } else {
                for (uint64_t times = 1 + random.below(4); times; --times)
                    bytes[random.below(random.one_in(2) ? std::min<size_t>(bytes.size(), 16)
                                                        : bytes.size())] =
                        static_cast<uint8_t>(random.bits());
            }
            return bytes;
        };
        for (size_t j = 0; j < group.bodies.size(); ++j) {
            const auto view = group.bodies[j].view();
            std::vector<uint8_t> bytes(view.begin(), view.end());
            bodies.emplace_back(j == which ? damage(bytes) : bytes);
        }
        if (which == group.bodies.size()) side = damage(side);
        group.decode(bodies, Exact<uint8_t>(side), 1, random.one_in(2));
        check(true, "", round);
    }
}

}  // namespace cachegen
