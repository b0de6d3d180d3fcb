#include "fused_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "block.h"
#include "crew.h"
#include "dispatch.h"
#include "error.h"
#include "rans.h"
#include "segment_layout.h"
#include "stream_reader.h"

namespace cachegen {
namespace {

constexpr int kLowestRow = -24, kRowsPerPass = 6;
// Starting a thread takes as long as decoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 17;

void require(bool sound, const char* what, const std::string& got, const std::string& expected) {
    if (!sound) throw Error(ErrorKind::Geometry, what, got, expected);
}

// Table row of a class in the pass whose step is 3^below (FORMAT.md, "Tables").
unsigned table_row(unsigned scale_class, unsigned below) {
    const int row = static_cast<int>(scale_class) - kRowsPerPass * static_cast<int>(below);
    return static_cast<unsigned>(std::clamp(row - kLowestRow, 0, static_cast<int>(kTableRows) - 1));
}

// ---- RoPE --------------------------------------------------------------------------------------

// cos and sin of one place: a row of kLanes for each frequency.
void fill_rope(const RopeKind& kind, int64_t first_position, const Shape& shape, uint64_t place,
               const uint8_t* lanes, float* cos, float* sin) {
    for (const float frequency : kind.frequencies) {
        for (unsigned i = 0; i < kLanes; ++i, ++cos, ++sin) {
            const auto token = static_cast<int64_t>(lanes[i] * shape.places() + place);
            // Angles are float products, as models compute them; their cos and sin are exact.
            const float angle = static_cast<float>(first_position + token) * frequency;
            const double scale = kind.scale;
            *cos = static_cast<float>(std::cos(static_cast<double>(angle)) * scale);
            *sin = static_cast<float>(std::sin(static_cast<double>(angle)) * scale);
        }
    }
}

// The angles of a whole chunk, shared by its layers; a long chunk has them made place by place.
class RopeCache {
public:
    static constexpr size_t kMostFloats = size_t{1} << 18;  // 1 MiB

    // lanes: of Kernels::angle_lanes.
    RopeCache(const std::vector<RopeKind>& kinds, const uint8_t* lanes)
        : kinds_(kinds), lanes_(lanes) {}

    // Makes the table of a target, if it is small enough to be kept. Not to be called by threads.
    void prepare(const PlaneTarget& target, const Shape& shape) {
        if (target.rope < 0 || find(target, shape)) return;
        const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
        const size_t place = kind.frequencies.size() * kLanes;
        if (floats_ + 2 * place * shape.places() > kMostFloats) return;
        floats_ += 2 * place * shape.places();
        Entry entry{target.rope, target.first_position, shape.tokens, {}};
        entry.angles.resize(2 * place * shape.places());
        for (uint64_t p = 0; p < shape.places(); ++p) {
            float* const cos = entry.angles.data() + 2 * place * p;
            fill_rope(kind, target.first_position, shape, p, lanes_, cos, cos + place);
        }
        entries_.push_back(std::move(entry));
    }

    // cos of a place, with sin behind it; made in `scratch` if the table is not kept.
    const float* angles(const PlaneTarget& target, const Shape& shape, uint64_t place,
                        std::vector<float>& scratch) const {
        const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
        const size_t size = kind.frequencies.size() * kLanes;
        if (const Entry* entry = find(target, shape)) return entry->angles.data() + 2 * size * place;
        scratch.resize(2 * size);
        fill_rope(kind, target.first_position, shape, place, lanes_, scratch.data(),
                  scratch.data() + size);
        return scratch.data();
    }

    const RopeKind& kind(int index) const { return kinds_[static_cast<size_t>(index)]; }

private:
    struct Entry {
        int rope;
        int64_t first_position;
        uint64_t tokens;
        std::vector<float> angles;
    };
    const Entry* find(const PlaneTarget& target, const Shape& shape) const {
        for (const Entry& entry : entries_)
            if (entry.rope == target.rope && entry.first_position == target.first_position &&
                entry.tokens == shape.tokens)
                return &entry;
        return nullptr;
    }

    const std::vector<RopeKind>& kinds_;
    const uint8_t* lanes_;
    std::vector<Entry> entries_;
    size_t floats_ = 0;
};

// A kind without frequencies turns nothing.
bool turns(const FusedDecode& work, const PlaneTarget& plane) {
    return plane.rope >= 0 && !work.ropes[static_cast<size_t>(plane.rope)].frequencies.empty();
}

// ---- Exempt rows -------------------------------------------------------------------------------

template <KVType kFrom, KVType kTo>
void convert_values(const uint8_t* from, std::byte* to, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        typename KVTraits<kFrom>::Bits in;
        std::memcpy(&in, from + i * sizeof in, sizeof in);
        float value = KVTraits<kFrom>::to_float(in);
        if (kTo == KVType::Float16 && std::isfinite(value))
            value = std::clamp(value, -65504.0f, 65504.0f);
        const auto out = KVTraits<kTo>::from_float(value);
        std::memcpy(to + i * sizeof out, &out, sizeof out);
    }
}

// Exempt rows of one head, to another element type if need be.
void convert(const uint8_t* from, KVType stored, std::byte* to, KVType type, size_t size) {
    using enum KVType;
    if (stored == type) {
        std::memcpy(to, from, size * (type == Float32 ? 4 : 2));
        return;
    }
    const auto run = [&]<KVType kFrom>() {
        switch (type) {
            case Float16: return convert_values<kFrom, Float16>(from, to, size);
            case BFloat16: return convert_values<kFrom, BFloat16>(from, to, size);
            case Float32: return convert_values<kFrom, Float32>(from, to, size);
        }
    };
    switch (stored) {
        case Float16: return run.operator()<Float16>();
        case BFloat16: return run.operator()<BFloat16>();
        case Float32: return run.operator()<Float32>();
    }
}

// ---- Groups ------------------------------------------------------------------------------------

// A run of channels that is finished as a whole, because RoPE needs all of it: one head.
struct Unit {
    uint32_t begin, size;
    uint32_t plane, head;
    size_t lookup;  // where its rows begin in PreparedGroup::lookup
};

struct alignas(64) CacheLine {
    std::byte bytes[64];
};

// A group made ready: checked, its streams found, its constants per channel.
struct PreparedGroup {
    const FusedGroup& group;
    Shape shape;
    std::vector<std::vector<StreamLayout>> streams;  // of every pass; none unless it is rANS
    std::vector<std::vector<uint16_t>> models;       // of every pass, one per channel
    std::vector<uint8_t> escapes;                    // of pass 0, one per channel
    std::vector<float> early_offset, late_offset, mean;
    std::vector<CacheLine> lookup;  // UnitJob::lookup of all units, or nothing
    std::vector<bool> is_exempt;  // by token, or empty
    std::vector<Unit> units;
    std::vector<uint32_t> unit_of;     // by channel
    std::vector<uint64_t> boundaries;  // steps where an item may begin, and the end

    PreparedGroup(const FusedDecode& work, const FusedGroup& source, const Kernels& kernel)
        : group(source), shape{source.tokens, source.channels} {
        check(work);
        find_units();
        fill_constants(work);
        find_streams();
        find_boundaries();
        if (group.coefficients) return;
        store_exempt(work);
        fill_lookup(work, kernel);
    }

    // A job for a unit, but for what depends on the place.
    UnitJob job_of(const Unit& unit) const {
        UnitJob job{};
        job.size = unit.size;
        const bool is_value = !group.coefficients && group.planes[unit.plane].is_value;
        job.scaling = is_value ? group.value_scaling : group.key_scaling;
        job.early_offset = early_offset.data() + unit.begin;
        job.late_offset = late_offset.data() + unit.begin;
        job.mean = mean.data() + unit.begin;
        if (!lookup.empty()) job.lookup = lookup.data() + unit.lookup;
        return job;
    }

private:
    void check(const FusedDecode& work) const {
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

    void find_units() {
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

    void fill_constants(const FusedDecode& work) {
        const size_t n = group.channels;
        early_offset.resize(n);
        late_offset.resize(n);
        mean.assign(n, 0.0f);
        for (const Unit& unit : units) {
            const bool is_value = !group.coefficients && group.planes[unit.plane].is_value;
            const float factor = is_value ? group.value_factor : 1.0f;
            for (size_t c = unit.begin; c < unit.begin + unit.size; ++c) {
                const size_t scale_class = group.side.classes[c] % kClasses;
                early_offset[c] = group.early_offset[scale_class] * factor;
                late_offset[c] = group.late_offset[scale_class] * factor;
                if (group.side.mean.empty()) continue;
                const auto level = static_cast<float>(static_cast<int8_t>(group.side.mean[c]));
                mean[c] = level * group.side.mean_scale * factor;
            }
        }
        for (unsigned j = 0; j < group.passes.size(); ++j) {
            uint16_t rows[kFamilies * kClasses];
            for (unsigned i = 0; i < kFamilies * kClasses; ++i)
                rows[i] = static_cast<uint16_t>(
                    (i / kClasses * kTableRows + table_row(i % kClasses, work.passes - 1 - j)) *
                    (j ? 2 : 1));
            models.emplace_back(n);
            for (size_t c = 0; c < n; ++c) models[j][c] = rows[group.side.classes[c]];
        }
        escapes.resize(n);
        for (size_t c = 0; c < n; ++c) escapes[c] = work.coarse.escape(models[0][c]);
        if (!group.side.exempt.empty()) is_exempt.resize(group.tokens);
        for (size_t i = 0; i < group.side.exempt_count(); ++i)
            is_exempt[group.side.exempt_token(i)] = true;
    }

    // A row of a lookup costs as much as a row of values, and serves every place.
    void fill_lookup(const FusedDecode& work, const Kernels& kernel) {
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
        std::vector<CacheLine> rows(lines);
        for (const Unit& unit : units) {
            UnitJob job = job_of(unit);
            // Only whether there is RoPE matters: the rows are floats then.
            if (turns(work, group.planes[unit.plane])) job.cos = job.mean;
            fill(job, rows.data() + unit.lookup);
        }
        lookup = std::move(rows);
    }

    void find_streams() {
        for (unsigned j = 0; j < group.passes.size(); ++j) {
            const PassBody& pass = group.passes[j];
            streams.emplace_back();
            uint64_t wanted = shape.tokens * shape.channels;
            switch (pass.kind) {
                case PassKind::Rans:
                    streams.back() = parse_layout(pass.bytes, shape, {});
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
    void find_boundaries() {
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

    void store_exempt(const FusedDecode& work) const {
        const size_t from_width = work.stored == KVType::Float32 ? 4 : 2;
        for (size_t i = 0; i < group.side.exempt_count(); ++i) {
            const uint8_t* row = group.side.rows.data() + i * group.channels * from_width;
            for (const Unit& unit : units) {
                const PlaneTarget& plane = group.planes[unit.plane];
                const int64_t offset = plane.offsets[group.side.exempt_token(i)];
                if (offset == kSkippedToken) continue;
                std::byte* const to = plane.data + offset + unit.head * plane.head_stride;
                convert(row + unit.begin * from_width, work.stored, to, work.type, unit.size);
            }
        }
    }
};

// ---- Items -------------------------------------------------------------------------------------

// One pass of an item: the streams it goes through, one after the other.
class PassCursor {
public:
    void start(const PreparedGroup& group, unsigned index, uint64_t step) {
        streams_ = group.streams[index];
        body_ = group.group.passes[index].bytes;
        end_ = UINT64_MAX;
        if (streams_.empty()) return;
        next_ = step / streams_[0].end_step;
        open_next();
    }

    bool is_rans() const { return !streams_.empty(); }
    uint64_t end() const { return end_; }
    StreamReader& reader() { return reader_; }

    // To be called after every block.
    void move_to(uint64_t step) {
        if (!is_rans()) return;
        reader_.check_words();
        if (step < end_) return;
        reader_.close();
        if (next_ < streams_.size()) open_next();
    }

private:
    void open_next() {
        reader_.open(body_, streams_[next_], next_);
        end_ = streams_[next_].end_step;
        ++next_;
    }

    std::span<const StreamLayout> streams_;
    std::span<const uint8_t> body_;
    uint64_t next_ = 0, end_ = 0;
    StreamReader reader_;
};

// One item at a time: a run of steps of one group through all its passes.
class Strand {
public:
    Strand(const FusedDecode& work, const RopeCache& ropes, const Kernels& kernel)
        : work_(work), ropes_(ropes), kernel_(kernel) {}

    void start(std::shared_ptr<const PreparedGroup> group, size_t item) {
        group_ = std::move(group);
        step_ = group_->boundaries[item];
        end_ = group_->boundaries[item + 1];
        for (unsigned j = 0; j < passes(); ++j) cursors_[j].start(*group_, j, step_);
        rope_place_ = rows_place_ = UINT64_MAX;
        begin_unit();
    }

    bool is_idle() const { return !group_; }
    unsigned passes() const { return static_cast<unsigned>(group_->group.passes.size()); }

    // Steps that can be decoded at once: of one head, within a stream of every pass.
    size_t steps_ahead() const {
        uint64_t end = std::min<uint64_t>(step_ + kBlockSteps, step_ + unit_.size - done_);
        for (unsigned j = 0; j < passes(); ++j) end = std::min(end, cursors_[j].end());
        return end - step_;
    }

    // Makes pass j of the next `steps` ready for the kernel; returns its run, or null if the pass
    // is not rANS and `end_pass` reads it.
    DecodeRun* begin_pass(unsigned j, size_t steps) {
        if (!cursors_[j].is_rans()) return nullptr;
        DecodeRun& run = cursors_[j].reader().run;
        run.models = group_->models[j].data() + channel();
        run.lanes = lanes_;
        run.values = values();
        run.escaped = escaped_;
        run.symbols = block_.bytes;
        if (j && !kernel_.decode_refine) {
            kernel_.value_contexts(values(), steps, contexts_.bytes);
            run.contexts = contexts_.bytes;
        }
        return &run;
    }

    void end_pass(unsigned j, size_t steps) {
        PassCursor& cursor = cursors_[j];
        const bool is_rans = cursor.is_rans();
        if (is_rans)
            cursor.reader().check_words();
        else
            read_plain(j, steps);
        if (j == 0) {
            if (!is_rans || !kernel_.decode_coarse) {
                kernel_.coarse_values(block_.bytes, steps, values());
                kernel_.find_bytes(block_.bytes, group_->escapes.data() + channel(), steps,
                                   escaped_);
            }
            if (is_rans) add_escapes(steps);
        } else if (!is_rans || !kernel_.decode_refine) {
            kernel_.refine_values(block_.bytes, power_of_three(j - 1), steps, values());
        }
    }

    void end_block(size_t steps) {
        step_ += steps;
        done_ += static_cast<uint32_t>(steps);
        for (unsigned j = 0; j < passes(); ++j) cursors_[j].move_to(step_);
        if (done_ < unit_.size) return;
        finish();
        if (step_ < end_)
            begin_unit();
        else
            group_.reset();
    }

private:
    uint64_t channel() const { return unit_.begin + done_; }
    int16_t* values() { return row(done_); }
    int16_t* row(uint32_t step) { return reinterpret_cast<int16_t*>(values_.get() + step); }

    void begin_unit() {
        const uint64_t channels = group_->shape.channels;
        unit_ = group_->units[group_->unit_of[step_ % channels]];
        done_ = 0;
        place_ = step_ / channels;
        lanes_ = group_->shape.active_lanes(place_);
        if (unit_.size <= room_) return;
        room_ = unit_.size;
        values_ = std::make_unique<CacheLine[]>(room_);
        const size_t lines = work_.type == KVType::Float32 ? 2 : 1;  // of a row of elements
        scratch_ = std::make_unique<CacheLine[]>(lines * ((size_t{room_} + 31) / 32 * 32));
    }

    void add_escapes(size_t steps) {
        const uint32_t active = ~uint32_t{0} >> (kLanes - lanes_);
        const uint8_t* const escapes = group_->escapes.data() + channel();
        StreamReader& reader = cursors_[0].reader();
        for (size_t begin = 0; begin < steps; begin += 16) {
            const size_t end = std::min(begin + 16, steps);
            uint32_t any = 0;
            for (size_t step = begin; step < end; ++step) any |= escaped_[step];
            if (!(any & active)) [[likely]] continue;
            for (size_t step = begin; step < end; ++step) {
                for (uint32_t lanes = escaped_[step] & active; lanes; lanes &= lanes - 1) {
                    const unsigned symbol = reader.next_escaped(escapes[step], step_ + step);
                    if (symbol > 2 * kMaxCoarse)
                        refuse_digit("symbol of pass 0", symbol, "0 to 254");
                    const int magnitude = static_cast<int>(symbol + 1) / 2;
                    const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
                    values()[step * kLanes + lane] =
                        static_cast<int16_t>(symbol % 2 ? -magnitude : magnitude);
                }
            }
        }
    }

    // A block of a pass that is not entropy-coded.
    void read_plain(unsigned j, size_t steps) {
        const std::span<const uint8_t> body = group_->group.passes[j].bytes;
        const BlockRows rows(group_->shape, step_);
        if (group_->group.passes[j].kind == PassKind::Bytes) {
            kernel_.gather(body.data() + rows.begin, rows.stride, lanes_, steps, block_.bytes);
        } else {
            std::memset(block_.bytes, 0, steps * kLanes);
            const size_t plane = body.size() / 2;
            for (unsigned lane = 0; lane < lanes_; ++lane) {
                for (size_t step = 0; step < steps; ++step) {
                    const uint64_t at = rows.begin + lane * rows.stride + step;
                    const auto bit = [&](size_t from) { return body[from + at / 8] >> at % 8 & 1; };
                    block_.bytes[step * kLanes + lane] =
                        static_cast<uint8_t>(bit(0) | bit(plane) << 1);
                }
            }
        }
        const unsigned largest = largest_of({block_.bytes, steps * kLanes});
        const unsigned most = j ? 2 : 2 * kMaxCoarse;
        if (largest > most)
            refuse_digit(j ? "digit" : "symbol of pass 0", largest, "0 to " + std::to_string(most));
    }

    [[noreturn]] static void refuse_digit(const char* what, unsigned got, std::string expected) {
        throw Error(ErrorKind::Corrupt, what, std::to_string(got), std::move(expected));
    }

    void finish_coefficients() {
        UnitJob job = group_->job_of(unit_);
        job.values = row(0);
        const size_t stride = group_->shape.places() * kLanes;
        float* const out = group_->group.coefficients + unit_.begin * stride + place_ * kLanes;
        uint8_t used[kBlockSteps];
        kernel_.scale_rows(job, out, stride, used);
        // Another thread may be at another place of the same components.
        for (uint32_t i = 0; i < unit_.size; ++i)
            if (used[i])
                std::atomic_ref(group_->group.used[unit_.begin + i])
                    .store(1, std::memory_order_relaxed);
    }

    void finish() {
        if (group_->group.coefficients) return finish_coefficients();
        const PlaneTarget& plane = group_->group.planes[unit_.plane];
        if (rows_place_ != place_ || rows_plane_ != unit_.plane) find_rows(plane);
        std::array<std::byte*, kLanes> rows;
        for (unsigned lane = 0; lane < kLanes; ++lane)
            rows[lane] =
                rows_[lane] ? rows_[lane] + unit_.head * plane.head_stride : nullptr;
        UnitJob job = group_->job_of(unit_);
        job.values = row(0);
        if (turns(work_, plane)) add_rope(plane, job);
        job.rows = rows.data();
        job.scratch = scratch_.get();
        kernel_.finish_unit[static_cast<size_t>(work_.type)](job);
    }

    // Where the tokens of the place go, head 0.
    void find_rows(const PlaneTarget& plane) {
        rows_place_ = place_;
        rows_plane_ = unit_.plane;
        rows_.fill(nullptr);
        for (unsigned lane = 0; lane < lanes_; ++lane) {
            const uint64_t token = lane * group_->shape.places() + place_;
            const int64_t offset = plane.offsets[token];
            if (offset == kSkippedToken) continue;
            if (!group_->is_exempt.empty() && group_->is_exempt[token]) continue;
            rows_[lane] = plane.data + offset;
        }
    }

    void add_rope(const PlaneTarget& plane, UnitJob& job) {
        const RopeKind& kind = ropes_.kind(plane.rope);
        if (rope_place_ != place_ || rope_plane_ != unit_.plane) {
            angles_ = ropes_.angles(plane, group_->shape, place_, rope_scratch_);
            rope_place_ = place_;
            rope_plane_ = unit_.plane;
        }
        job.half = kind.frequencies.size();
        job.cos = angles_;
        job.sin = angles_ + job.half * kLanes;
        job.interleaved = kind.interleaved;
    }

    const FusedDecode& work_;
    const RopeCache& ropes_;
    const Kernels& kernel_;
    std::shared_ptr<const PreparedGroup> group_;
    std::array<PassCursor, kMaxPasses> cursors_;
    uint64_t step_ = 0, end_ = 0, place_ = 0;
    unsigned lanes_ = 0;
    Unit unit_{};
    uint32_t done_ = 0;  // steps of the unit decoded so far
    uint32_t room_ = 0;  // largest unit so far
    std::unique_ptr<CacheLine[]> values_;  // a row of kLanes values each
    std::unique_ptr<CacheLine[]> scratch_;
    uint64_t rows_place_ = UINT64_MAX;
    uint32_t rows_plane_ = 0;
    std::array<std::byte*, kLanes> rows_;
    uint64_t rope_place_ = UINT64_MAX;
    uint32_t rope_plane_ = 0;
    const float* angles_ = nullptr;
    std::vector<float> rope_scratch_;
    uint32_t escaped_[kBlockSteps];  // of pass 0: lanes of each step with the escape index
    Block block_, contexts_;
};

// Hands out items, group by group, to all threads; a group is made ready when its first item is
// asked for.
class ItemQueue {
public:
    ItemQueue(const FusedDecode& work, const Kernels& kernel) : work_(work), kernel_(kernel) {}

    // Where one thread stands.
    struct Hand {
        std::shared_ptr<const PreparedGroup> group;
        size_t item = 0;
    };

    // With many groups a thread takes one as a whole, else they share the items of one.
    bool start_next(Strand& strand, Hand& own) {
        if (work_.groups.size() >= kGroupsForOwn * work_.threads) return start(strand, own);
        const std::lock_guard lock(mutex_);
        return start(strand, shared_);
    }

    // After an error: what has begun ends, so that the first group's error is found.
    void stop() { next_group_ = work_.groups.size(); }

private:
    static constexpr size_t kGroupsForOwn = 4;

    bool start(Strand& strand, Hand& hand) {
        while (!hand.group || hand.item + 1 >= hand.group->boundaries.size()) {
            hand.group.reset();
            const size_t next = next_group_.fetch_add(1);
            if (next >= work_.groups.size()) return false;
            hand.group =
                std::make_shared<const PreparedGroup>(work_, work_.groups[next], kernel_);
            hand.item = 0;
            if (hand.group->shape.steps() == 0) hand.group.reset();
        }
        strand.start(hand.group, hand.item++);
        return true;
    }

    const FusedDecode& work_;
    const Kernels& kernel_;
    std::atomic<size_t> next_group_ = 0;
    std::mutex mutex_;
    Hand shared_;
};

// The tables of the ladder in the form that the kernels in use take.
struct Coders {
    Coders(const FusedDecode& work, const Kernels& backend)
        : kernel(backend), buckets(work.coarse.buckets()) {
        if (kernel.decode_coarse)
            coarse_values = work.coarse.coarse();
        else
            coarse = work.coarse.alias(buckets);
        if (kernel.decode_refine)
            refine_values = work.refine.refine();
        else
            refine = work.refine.alias(kContextBuckets);
    }

    void decode(unsigned j, std::span<DecodeRun* const> runs, size_t steps) const {
        if (runs.empty()) return;
        if (j == 0 && coarse_values)
            kernel.decode_coarse(coarse_values, runs.data(), runs.size(), steps);
        else if (j == 0)
            kernel.decode_runs(coarse, buckets, runs.data(), runs.size(), steps);
        else if (refine_values)
            kernel.decode_refine(refine_values, power_of_three(j - 1), runs.data(), runs.size(),
                                 steps);
        else
            kernel.decode_runs(refine, kContextBuckets, runs.data(), runs.size(), steps);
    }

    const Kernels& kernel;
    unsigned buckets;
    const AliasTable *coarse = nullptr, *refine = nullptr;
    const CoarseTable* coarse_values = nullptr;
    const RefineTable* refine_values = nullptr;
};

// Decodes one block of every strand, pass by pass, side by side.
void decode_block(std::span<Strand*> strands, const Coders& coders) {
    size_t steps = kBlockSteps;
    unsigned passes = 0;
    for (const Strand* strand : strands) {
        steps = std::min(steps, strand->steps_ahead());
        passes = std::max(passes, strand->passes());
    }
    for (unsigned j = 0; j < passes; ++j) {
        std::array<DecodeRun*, kGroupStreams> runs;
        size_t count = 0;
        for (Strand* strand : strands) {
            if (j >= strand->passes()) continue;
            if (DecodeRun* run = strand->begin_pass(j, steps)) runs[count++] = run;
        }
        coders.decode(j, std::span(runs).first(count), steps);
        for (Strand* strand : strands)
            if (j < strand->passes()) strand->end_pass(j, steps);
    }
    for (Strand* strand : strands) strand->end_block(steps);
}

}  // namespace

void decode_groups(const FusedDecode& work) {
    require(work.coarse.count() == kFamilies * kTableRows && work.coarse.buckets() == 32 &&
                work.refine.count() == 2 * kFamilies * kTableRows &&
                work.refine.alphabet() <= 3 && !work.refine.any_escape(),
            "tables", "others", "those of the ladder");
    const Kernels& kernel = kernels();
    RopeCache ropes(work.ropes, kernel.angle_lanes);
    for (const FusedGroup& group : work.groups)
        for (const PlaneTarget& plane : group.planes)
            if (plane.rope < static_cast<int>(work.ropes.size()))
                ropes.prepare(plane, {group.tokens, group.channels});
    const Coders coders(work, kernel);
    ItemQueue queue(work, kernel);
    uint64_t values = 0;
    for (const FusedGroup& group : work.groups) values += group.tokens * group.channels;
    run_crew(std::min<uint64_t>(work.threads, values / kValuesPerThread + 1), [&](size_t) {
        ItemQueue::Hand hand;
        std::vector<std::unique_ptr<Strand>> strands;
        for (size_t i = 0; i < kGroupStreams; ++i)
            strands.push_back(std::make_unique<Strand>(work, ropes, kernel));
        try {
            while (true) {
                std::array<Strand*, kGroupStreams> busy;
                size_t count = 0;
                for (const auto& strand : strands)
                    if (!strand->is_idle() || queue.start_next(*strand, hand))
                        busy[count++] = strand.get();
                if (!count) return;
                decode_block(std::span(busy).first(count), coders);
            }
        } catch (...) {
            queue.stop();
            throw;
        }
    });
}

void finish_plane(const FinishPlane& work) {
    const Shape shape{work.tokens, 1};
    const auto finish = kernels().finish_row[static_cast<size_t>(work.type)];
    const PlaneTarget& plane = work.plane;
    for (uint64_t place = 0; place < shape.places(); ++place) {
        for (unsigned lane = 0; lane < shape.active_lanes(place); ++lane) {
            const uint64_t token = lane * shape.places() + place;
            const int64_t offset = plane.offsets[token];
            if (offset == kSkippedToken || work.exempt[token]) continue;
            const float* row = work.values + (place * kLanes + lane) * work.row_stride;
            const size_t angles = token * work.half;
            for (uint32_t head = 0; head < plane.heads; ++head) {
                const size_t begin = size_t{head} * plane.dim;
                finish({row + begin, work.row_stride, plane.dim, work.mean + begin, work.factor,
                        work.cos ? work.cos + angles : nullptr,
                        work.sin ? work.sin + angles : nullptr, work.half, work.interleaved,
                        plane.data + offset + head * plane.head_stride});
            }
        }
    }
}

}  // namespace cachegen
