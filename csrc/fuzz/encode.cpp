// Fuzzing of the fused encoder: every backend and any number of threads make the same bytes, which
// decode to as many digits as there are values, whatever bits the input has.
#include <cstring>

#include "dispatch.h"
#include "error.h"
#include "fused_encode.h"
#include "fuzz.h"
#include "rans.h"

namespace cachegen {
namespace {

// Whatever the encoder reads, in blocks without slack.
struct Input {
    Shape shape;
    KVType type = KVType::Float32;
    uint32_t heads = 1, dim = 1;
    bool heads_first = false, with_rope = false, with_components = false;
    size_t half = 0;
    unsigned passes = 1;
    float step = 1;
    Exact<std::byte> elements{0};
    Exact<float> angles{0}, components{0};
    Exact<uint8_t> families{0}, base_classes{0};
    Exact<int16_t> costs{0};
    Exact<double> centroids{0};
    std::vector<uint32_t> exempt;

    EncodeGroup group() const {
        EncodeGroup group;
        group.shape = shape;
        group.exempt = exempt;
        if (with_components) {
            group.components = components.data.get();
            group.families = families.view();
            group.base_classes = base_classes.view();
            return group;
        }
        EncodePlane plane{};
        const int64_t width = type == KVType::Float32 ? 4 : 2;
        const auto row = static_cast<int64_t>(dim) * width;
        plane.data = elements.data.get();
        plane.type = type;
        plane.token_stride = heads_first ? row : row * heads;
        plane.head_stride = heads_first ? row * static_cast<int64_t>(shape.tokens) : row;
        plane.heads = heads;
        plane.dim = dim;
        plane.weight = with_rope ? 1.0f : 1.5f;
        if (with_rope) {
            plane.cos = angles.data.get();
            plane.sin = angles.data.get() + half * shape.places() * kLanes;
            plane.half = half;
            plane.interleaved = half % 2 == 1;
        }
        group.planes.push_back(plane);
        return group;
    }
};

Input random_input(Random& random) {
    Input in;
    in.heads = static_cast<uint32_t>(1 + random.below(3));
    in.dim = static_cast<uint32_t>(1 + random.below(random.one_in(3) ? 140 : 12));
    in.shape = {random.one_in(9) ? 0 : 1 + random.below(random.one_in(4) ? 600 : 90),
                uint64_t{in.heads} * in.dim};
    in.type = static_cast<KVType>(random.below(kKVTypes));
    in.heads_first = random.one_in(2);
    in.with_rope = random.one_in(2);
    in.with_components = random.one_in(4);
    in.half = random.below(in.dim / 2 + 1);
    in.passes = static_cast<unsigned>(1 + random.below(kMaxPasses));
    in.step = 0.001f * static_cast<float>(1 + random.below(4000));
    const size_t size = in.shape.tokens * in.shape.channels;
    const size_t columns = in.shape.places() * kLanes;
    const auto small = [&] { return static_cast<float>(random.below(2001)) * 0.01f - 10; };
    const bool wild = random.one_in(6);
    in.elements = Exact<std::byte>(size * (in.type == KVType::Float32 ? 4 : 2));
    for (size_t i = 0; i < size; ++i) {
        const float value = random.one_in(50) ? 100 * small() : small();
        const auto put = [&](auto bits) {
            if (wild && random.one_in(4)) bits = static_cast<decltype(bits)>(random.bits());
            std::memcpy(in.elements.data.get() + i * sizeof bits, &bits, sizeof bits);
        };
        switch (in.type) {
            case KVType::Float16: put(KVTraits<KVType::Float16>::from_float(value)); break;
            case KVType::BFloat16: put(KVTraits<KVType::BFloat16>::from_float(value)); break;
            default: put(bits_from_float(value));
        }
    }
    in.angles = Exact<float>(2 * in.half * columns);
    for (size_t i = 0; i < in.angles.size; ++i) in.angles.data[i] = 0.1f * small();
    in.components = Exact<float>(in.with_components ? in.shape.channels * columns : 0);
    for (size_t c = 0; in.with_components && c < in.shape.channels; ++c)
        for (size_t i = 0; i < columns; ++i)
            in.components.data[c * columns + i] =
                (kLanes - 1 - i % kLanes) * in.shape.places() + i / kLanes < in.shape.tokens
                    ? small()
                    : 0.0f;
    in.families = Exact<uint8_t>(in.shape.channels);
    in.base_classes = Exact<uint8_t>(in.shape.channels);
    for (size_t c = 0; c < in.shape.channels; ++c) {
        in.families.data[c] = static_cast<uint8_t>(random.below(3));
        in.base_classes.data[c] = static_cast<uint8_t>(random.below(64));
    }
    const size_t counted = kCoarseCounts + kRefineCounts * (in.passes - 1);
    in.costs = Exact<int16_t>(counted * kWays);
    for (size_t i = 0; i < in.costs.size; ++i)
        in.costs.data[i] = static_cast<int16_t>(random.below(20481));
    in.centroids = Exact<double>(kDecays * in.passes * 2 * 64);
    for (size_t i = 0; i < in.centroids.size; ++i)
        in.centroids.data[i] = static_cast<double>(random.below(50)) * 0.01;
    for (uint32_t token = 0; token < in.shape.tokens; ++token)
        if (random.one_in(20)) in.exempt.push_back(token);
    return in;
}

// All that an encoder finds, as bytes; empty if the input was refused.
std::vector<std::vector<uint8_t>> encode(const Input& in, const EncodeTables& tables,
                                         size_t threads) {
    std::vector<EncodeGroup> groups{in.group(), in.group()};
    survey_groups(groups, threads);
    if (groups[0].refused) return {};
    const auto stores = encode_groups(
        groups, {in.passes, tables, in.costs.data.get(), in.centroids.data.get()},
        in.step, threads);
    std::vector<std::vector<uint8_t>> found;
    for (const EncodeGroup& group : groups) {
        found.push_back(group.classes);
        const auto add = [&](const void* data, size_t size) {
            const auto* bytes = static_cast<const uint8_t*>(data);
            found.emplace_back(bytes, bytes + size);
        };
        add(group.exempt.data(), group.exempt.size() * sizeof group.exempt[0]);
        add(group.mean_levels.data(), group.mean_levels.size());
        add(&group.mean_scale, sizeof group.mean_scale);
        add(&group.energy, sizeof group.energy);
        add(&group.class_offset, sizeof group.class_offset);
        add(&group.errors, sizeof group.errors);
        for (const EncodedPass& pass : group.passes) {
            found.push_back({static_cast<uint8_t>(pass.kind)});
            add(pass.body.data(), pass.body.size());
        }
    }
    return found;
}

// Decodes every pass of a group of which `classes` are known; contexts come from the digits.
bool decodes(const Input& in, const EncodeGroup& group, const LadderTables& tables) {
    const size_t size = in.shape.tokens * in.shape.channels;
    std::vector<uint8_t> symbols(size), seen(size);
    for (unsigned pass = 0; pass < in.passes; ++pass) {
        const EncodedPass& coded = group.passes[pass];
        if (coded.kind != EncodedPass::Kind::Rans) return true;
        std::vector<uint16_t> models(in.shape.channels);
        for (size_t c = 0; c < models.size(); ++c)
            models[c] = static_cast<uint16_t>(
                ladder_row(group.classes[c], in.passes - 1 - pass) * (pass ? 2 : 1));
        const Coding coding{in.shape, pass ? *tables.refine : *tables.coarse, models, false, {},
                            pass ? seen.data() : nullptr};
        try {
            decode_segment(coded.body, coding, 0, ~uint64_t{0}, symbols.data());
        } catch (const Error&) {
            return false;
        }
        for (size_t i = 0; i < size; ++i)
            seen[i] |= static_cast<uint8_t>(pass ? symbols[i] != 1 : symbols[i] != 0);
    }
    return true;
}

}  // namespace

void fuzz_encode(Random& random, uint64_t round) {
    static const EncodeTables tables(*ladder_tables().coarse, *ladder_tables().refine);
    const Input in = random_input(random);
    const auto found = encode(in, tables, 1);
    check(encode(in, tables, 3) == found, "threads change what is encoded", round);
    const std::string_view isa = kernels().isa;
    select_isa("scalar");
    check(encode(in, tables, 1) == found, "backends encode different bytes", round);
    select_isa(isa);
    if (found.empty()) return;
    std::vector<EncodeGroup> groups{in.group()};
    survey_groups(groups, 1);
    const auto stores = encode_groups(
        groups, {in.passes, tables, in.costs.data.get(), in.centroids.data.get()},
        in.step, 1);
    check(in.shape.tokens == 0 || decodes(in, groups[0], ladder_tables()),
          "what was encoded does not decode", round);
}

}  // namespace cachegen
