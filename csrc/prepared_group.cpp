#include "prepared_group.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "rows_convert.h"

namespace cachegen {
namespace {

constexpr int kLowestRow = -24, kRowsPerPass = 6;
// A pass with fewer bytes than one for so many values counts as sparse.
constexpr uint64_t kValuesPerByte = 128;

// Table row of a class in the pass whose step is 3^below (FORMAT.md, "Tables").
unsigned table_row(unsigned scale_class, unsigned below) {
    const int row = static_cast<int>(scale_class) - kRowsPerPass * static_cast<int>(below);
    return static_cast<unsigned>(std::clamp(row - kLowestRow, 0, static_cast<int>(kTableRows) - 1));
}

}  // namespace

void require(bool sound, const char* what, const std::string& got, const std::string& expected) {
    if (!sound) throw Error(ErrorKind::Geometry, what, got, expected);
}

bool turns(const FusedDecode& work, const PlaneTarget& plane) {
    return plane.rope >= 0 && !work.ropes[static_cast<size_t>(plane.rope)].frequencies.empty();
}

PreparedGroup::PreparedGroup(const FusedDecode& work, const FusedGroup& source,
                             const Kernels& kernel)
    : group(source), shape{source.tokens, source.channels} {
    check(work);
    find_units();
    fill_constants(work);
    find_streams();
    find_boundaries();
    if (group.coefficients) return;
    store_exempt(work);
    if (!is_sparse()) fill_lookup(work, kernel);
}

bool PreparedGroup::is_sparse() const {
    if (group.coefficients || group.passes.size() != 1) return false;
    const PassBody& pass = group.passes[0];
    if (pass.kind == PassKind::Sparse) return true;
    // Symbols that take so few bits cannot be many.
    return pass.kind == PassKind::Rans && pass.bytes.size() * kValuesPerByte < shape.tokens * shape.channels;
}

UnitJob PreparedGroup::job_of(const Unit& unit) const {
    UnitJob job{};
    job.size = unit.size;
    const bool is_value = !group.coefficients && group.planes[unit.plane].is_value;
    job.scaling = is_value ? group.value_scaling : group.key_scaling;
    job.early_offset = early_offset.data() + unit.begin;
    job.late_offset = late_offset.data() + unit.begin;
    job.mean = mean.data() + unit.begin;
    if (lookup) job.lookup = lookup.get() + unit.lookup;
    return job;
}

void PreparedGroup::check(const FusedDecode& work) const {
    const size_t count = group.passes.size();
    require(group.channels > 0 && group.tokens <= Shape::kMaxSymbols / group.channels,
            "symbol matrix", std::to_string(group.channels) + " channels", "1 or more");
    require(count >= 1 && count <= work.passes && work.passes <= kMaxPasses, "passes",
            std::to_string(count), "1 to " + std::to_string(work.passes));
    require(group.side.classes.size() == group.channels, "classes",
            std::to_string(group.side.classes.size()), std::to_string(group.channels));
    require(group.early_offset.size() == kClasses && group.late_offset.size() == kClasses,
            "offsets", std::to_string(group.early_offset.size()), std::to_string(kClasses));
    if (group.coefficients) return;
    uint64_t channels = 0;
    for (const PlaneTarget& plane : group.planes) {
        channels += uint64_t{plane.heads} * plane.dim;
        require(plane.rope < static_cast<int>(work.ropes.size()), "RoPE kind",
                std::to_string(plane.rope), "one that exists");
        if (plane.rope >= 0) {
            const auto& kind = work.ropes[static_cast<size_t>(plane.rope)];
            if (2 * kind.frequencies.size() > plane.dim)
                throw Error(ErrorKind::Corrupt, "RoPE frequencies",
                            std::to_string(kind.frequencies.size()),
                            "up to half of " + std::to_string(plane.dim));
        }
    }
    require(channels == group.channels, "channels of the planes", std::to_string(channels),
            std::to_string(group.channels));
}

void PreparedGroup::find_units() {
    unit_of.resize(group.channels);
    uint32_t begin = 0;
    // Coefficients are finished by blocks.
    while (group.coefficients && begin < group.channels) {
        const auto size =
            static_cast<uint32_t>(std::min<uint64_t>(kBlockSteps, group.channels - begin));
        std::fill_n(unit_of.begin() + begin, size, static_cast<uint32_t>(units.size()));
        units.push_back({begin, size, 0, 0, 0});
        begin += size;
    }
    for (uint32_t plane = 0; plane < group.planes.size(); ++plane) {
        const PlaneTarget& target = group.planes[plane];
        for (uint32_t head = 0; head < target.heads; ++head, begin += target.dim) {
            std::fill_n(unit_of.begin() + begin, target.dim,
                        static_cast<uint32_t>(units.size()));
            units.push_back({begin, target.dim, plane, head, 0});
        }
    }
}

void PreparedGroup::fill_constants(const FusedDecode& work) {
    const size_t n = group.channels;
    early_offset.resize(n);
    late_offset.resize(n);
    mean.assign(n, 0.0f);
    const uint8_t* const classes = group.side.classes.data();
    for (const Unit& unit : units) {
        const bool is_value = !group.coefficients && group.planes[unit.plane].is_value;
        const float factor = is_value ? group.value_factor : 1.0f;
        for (size_t c = unit.begin; c < unit.begin + unit.size; ++c) {
            early_offset[c] = group.early_offset[classes[c] % kClasses] * factor;
            late_offset[c] = group.late_offset[classes[c] % kClasses] * factor;
        }
        if (group.side.mean.empty()) continue;
        const uint8_t* const levels = group.side.mean.data();
        for (size_t c = unit.begin; c < unit.begin + unit.size; ++c)
            mean[c] = static_cast<float>(static_cast<int8_t>(levels[c])) * group.side.mean_scale *
                          factor +
                      0.0f;  // never -0, as sums with it are none
    }
    for (unsigned j = 0; j < group.passes.size(); ++j) {
        uint16_t rows[kFamilies * kClasses];
        for (unsigned i = 0; i < kFamilies * kClasses; ++i)
            rows[i] = static_cast<uint16_t>(
                (i / kClasses * kTableRows + table_row(i % kClasses, work.passes - 1 - j)) *
                (j ? 2 : 1));
        models.emplace_back(group.passes[j].kind == PassKind::Rans ? n : 0);
        for (size_t c = 0; c < models[j].size(); ++c) models[j][c] = rows[classes[c]];
    }
    escapes.resize(models[0].size());
    for (size_t c = 0; c < escapes.size(); ++c) escapes[c] = work.coarse.escape(models[0][c]);
    if (!group.side.exempt.empty()) is_exempt.resize(group.tokens);
    for (size_t i = 0; i < group.side.exempt_count(); ++i)
        is_exempt[group.side.exempt_token(i)] = true;
}

// A row of a lookup costs as much as a row of values, and serves every place.
void PreparedGroup::fill_lookup(const FusedDecode& work, const Kernels& kernel) {
    constexpr uint64_t kFewestPlaces = 3;
    const auto fill = kernel.fill_lookup[static_cast<size_t>(work.type)];
    if (!fill || shape.places() < kFewestPlaces) return;
    size_t lines = 0;
    for (Unit& unit : units) {
        const bool wide =
            work.type == KVType::Float32 || turns(work, group.planes[unit.plane]);
        unit.lookup = lines;
        lines += size_t{unit.size} * kLanes * (wide ? 4 : 2) / sizeof(CacheLine);
    }
    auto rows = std::make_unique_for_overwrite<CacheLine[]>(lines);
    for (const Unit& unit : units) {
        UnitJob job = job_of(unit);
        // Only whether there is RoPE matters: the rows are floats then.
        if (turns(work, group.planes[unit.plane])) job.cos = job.mean;
        fill(job, rows.get() + unit.lookup);
    }
    lookup = std::move(rows);
}

void PreparedGroup::find_streams() {
    for (unsigned j = 0; j < group.passes.size(); ++j) {
        const PassBody& pass = group.passes[j];
        streams.emplace_back();
        uint64_t wanted = shape.tokens * shape.channels;
        switch (pass.kind) {
            case PassKind::Rans:
                streams.back() = parse_layout(pass.bytes, shape, {});
                continue;
            case PassKind::Sparse:
                require(j == 0, "sparse pass", std::to_string(j), "pass 0");
                sparse = parse_sparse(pass.bytes, shape, 2 * kMaxCoarse);
                continue;
            case PassKind::Bytes: break;
            case PassKind::Packed: wanted = 2 * ceil_div(wanted, 8);
        }
        if (pass.bytes.size() != wanted || (pass.kind == PassKind::Bytes) != (j == 0))
            throw Error(ErrorKind::Corrupt, "body of pass " + std::to_string(j),
                        std::to_string(pass.bytes.size()) + " bytes",
                        std::to_string(wanted) + " bytes");
        const unsigned used = static_cast<unsigned>(shape.tokens * shape.channels % 8);
        if (pass.kind == PassKind::Packed && used)
            for (const size_t end : {wanted / 2, wanted})
                if (pass.bytes[end - 1] >> used)
                    throw Error(ErrorKind::Corrupt, "packed segment", "non-zero padding",
                                "zero bits");
    }
}

// Items begin where streams of all passes do, and a head.
void PreparedGroup::find_boundaries() {
    boundaries.push_back(0);
    uint64_t spacing = 0;
    bool equal = true;
    for (unsigned j = 0; j < group.passes.size(); ++j) {
        if (streams[j].empty()) continue;
        const uint64_t steps = streams[j][0].end_step;
        equal &= spacing == 0 || spacing == steps;
        spacing = steps;
    }
    if (spacing == 0) spacing = shape.channels;
    if (equal) {
        for (uint64_t step = spacing; step < shape.steps(); step += spacing) {
            const uint64_t channel = step % shape.channels;
            if (units[unit_of[channel]].begin == channel) boundaries.push_back(step);
        }
    }
    boundaries.push_back(shape.steps());
}

void PreparedGroup::store_exempt(const FusedDecode& work) const {
    const size_t from_width = work.stored == KVType::Float32 ? 4 : 2;
    for (size_t i = 0; i < group.side.exempt_count(); ++i) {
        const uint8_t* row = group.side.rows.data() + i * group.channels * from_width;
        for (const Unit& unit : units) {
            const PlaneTarget& plane = group.planes[unit.plane];
            const int64_t offset = plane.offsets[group.side.exempt_token(i)];
            if (offset == kSkippedToken) continue;
            std::byte* const to = plane.data + offset + unit.head * plane.head_stride;
            convert_row(work.stored,
                        reinterpret_cast<const std::byte*>(row + unit.begin * from_width),
                        work.type, to, unit.size);
        }
    }
}

}  // namespace cachegen
