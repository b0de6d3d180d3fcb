#include "fused_decode.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "block.h"
#include "dispatch.h"
#include "error.h"
#include "rans.h"
#include "segment_layout.h"
#include "stream_reader.h"

namespace cachegen {
namespace {

constexpr int kLowestRow = -24, kRowsPerPass = 6;

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
               float* cos, float* sin) {
    for (const float frequency : kind.frequencies) {
        for (unsigned lane = 0; lane < kLanes; ++lane, ++cos, ++sin) {
            const auto token = static_cast<int64_t>(lane * shape.places() + place);
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

    explicit RopeCache(const std::vector<RopeKind>& kinds) : kinds_(kinds) {}

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
            fill_rope(kind, target.first_position, shape, p, cos, cos + place);
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
        fill_rope(kind, target.first_position, shape, place, scratch.data(),
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
    std::vector<Entry> entries_;
    size_t floats_ = 0;
};

// ---- Groups ------------------------------------------------------------------------------------

// A run of channels that is finished as a whole, because RoPE needs all of it: one head.
struct Unit {
    uint32_t begin, size;
    uint32_t plane, head;
};

// A group made ready: checked, its streams found, its constants per channel.
struct PreparedGroup {
    const FusedGroup& group;
    Shape shape;
    std::vector<std::vector<StreamLayout>> streams;  // of every pass; none unless it is rANS
    std::vector<std::vector<uint16_t>> models;       // of every pass, one per channel
    std::vector<uint8_t> escapes;                    // of pass 0, one per channel
    std::vector<float> early_offset, late_offset, mean;
    std::vector<bool> is_exempt;  // by token, or empty
    std::vector<Unit> units;
    std::vector<uint32_t> unit_of;     // by channel
    std::vector<uint64_t> boundaries;  // steps where an item may begin, and the end

    PreparedGroup(const FusedDecode& work, const FusedGroup& source)
        : group(source), shape{source.tokens, source.channels} {
        check(work);
        find_units();
        fill_constants(work);
        find_streams();
        find_boundaries();
        store_exempt(work.type);
    }

private:
    void check(const FusedDecode& work) const {
        const size_t count = group.passes.size();
        require(group.channels > 0 && group.tokens <= Shape::kMaxSymbols / group.channels,
                "symbol matrix", std::to_string(group.channels) + " channels", "1 or more");
        require(count >= 1 && count <= work.passes && work.passes <= kMaxPasses, "passes",
                std::to_string(count), "1 to " + std::to_string(work.passes));
        require(group.classes.size() == group.channels, "classes",
                std::to_string(group.classes.size()), std::to_string(group.channels));
        require(group.mean.empty() || group.mean.size() == group.channels, "mean",
                std::to_string(group.mean.size()), std::to_string(group.channels));
        require(group.early_offset.size() == kClasses && group.late_offset.size() == kClasses,
                "offsets", std::to_string(group.early_offset.size()), std::to_string(kClasses));
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
        for (size_t i = 0; i < group.exempt_tokens.size(); ++i)
            require(group.exempt_tokens[i] < group.tokens, "exempt token",
                    std::to_string(group.exempt_tokens[i]), "a token of the group");
        for (const uint8_t both : group.classes)
            if (both >= kFamilies * kClasses)
                throw Error(ErrorKind::Corrupt, "class", std::to_string(both), "0 to 191");
    }

    void find_units() {
        unit_of.resize(group.channels);
        uint32_t begin = 0;
        for (uint32_t plane = 0; plane < group.planes.size(); ++plane) {
            const PlaneTarget& target = group.planes[plane];
            for (uint32_t head = 0; head < target.heads; ++head, begin += target.dim) {
                std::fill_n(unit_of.begin() + begin, target.dim,
                            static_cast<uint32_t>(units.size()));
                units.push_back({begin, target.dim, plane, head});
            }
        }
    }

    void fill_constants(const FusedDecode& work) {
        const size_t n = group.channels;
        early_offset.resize(n);
        late_offset.resize(n);
        mean.assign(n, 0.0f);
        for (const Unit& unit : units) {
            const float factor =
                group.planes[unit.plane].is_value ? group.value_factor : 1.0f;
            for (size_t c = unit.begin; c < unit.begin + unit.size; ++c) {
                const size_t scale_class = group.classes[c] % kClasses;
                early_offset[c] = group.early_offset[scale_class] * factor;
                late_offset[c] = group.late_offset[scale_class] * factor;
                if (!group.mean.empty()) mean[c] = group.mean[c] * factor;
            }
        }
        for (unsigned j = 0; j < group.passes.size(); ++j) {
            uint16_t rows[kFamilies * kClasses];
            for (unsigned i = 0; i < kFamilies * kClasses; ++i)
                rows[i] = static_cast<uint16_t>(
                    (i / kClasses * kTableRows + table_row(i % kClasses, work.passes - 1 - j)) *
                    (j ? 2 : 1));
            models.emplace_back(n);
            for (size_t c = 0; c < n; ++c) models[j][c] = rows[group.classes[c]];
        }
        escapes.resize(n);
        for (size_t c = 0; c < n; ++c) escapes[c] = work.coarse.escape(models[0][c]);
        if (!group.exempt_tokens.empty()) {
            is_exempt.resize(group.tokens);
            for (const uint32_t token : group.exempt_tokens) is_exempt[token] = true;
        }
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

    void store_exempt(KVType type) const {
        const size_t width = type == KVType::Float32 ? 4 : 2;
        for (size_t i = 0; i < group.exempt_tokens.size(); ++i) {
            const std::byte* row = group.exempt_rows + i * group.channels * width;
            for (const Unit& unit : units) {
                const PlaneTarget& plane = group.planes[unit.plane];
                const int64_t offset = plane.offsets[group.exempt_tokens[i]];
                if (offset == kSkippedToken) continue;
                std::memcpy(plane.data + offset + unit.head * plane.head_stride,
                            row + unit.begin * width, unit.size * width);
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
    Strand(const FusedDecode& work, const RopeCache& ropes) : work_(work), ropes_(ropes) {}

    void start(std::shared_ptr<const PreparedGroup> group, size_t item) {
        group_ = std::move(group);
        step_ = group_->boundaries[item];
        end_ = group_->boundaries[item + 1];
        for (unsigned j = 0; j < passes(); ++j) cursors_[j].start(*group_, j, step_);
        rope_place_ = UINT64_MAX;
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
        if (j) kernels().value_contexts(values(), steps, contexts_.bytes);
        if (!cursors_[j].is_rans()) return nullptr;
        DecodeRun& run = cursors_[j].reader().run;
        run.models = group_->models[j].data() + channel();
        run.contexts = j ? contexts_.bytes : nullptr;
        run.symbols = block_.bytes;
        run.lanes = lanes_;
        return &run;
    }

    void end_pass(unsigned j, size_t steps) {
        PassCursor& cursor = cursors_[j];
        if (cursor.is_rans())
            cursor.reader().check_words();
        else
            read_plain(j, steps);
        if (j) {
            kernels().refine_values(block_.bytes, power_of_three(j - 1), steps, values());
            return;
        }
        if (cursor.is_rans()) add_escapes(steps);
        kernels().coarse_values(block_.bytes, steps, values());
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
    int16_t* values() { return values_.get() + size_t{done_} * kLanes; }

    void begin_unit() {
        const uint64_t channels = group_->shape.channels;
        unit_ = group_->units[group_->unit_of[step_ % channels]];
        done_ = 0;
        place_ = step_ / channels;
        lanes_ = group_->shape.active_lanes(place_);
        if (unit_.size <= room_) return;
        room_ = unit_.size;
        values_ = std::make_unique<int16_t[]>(size_t{room_} * kLanes);
        const size_t bytes = size_t{room_} * kLanes * (work_.type == KVType::Float32 ? 4 : 2);
        scratch_ = std::make_unique<std::byte[]>(bytes + 64);
    }

    void add_escapes(size_t steps) {
        uint32_t found[kBlockSteps];
        const uint8_t* const escapes = group_->escapes.data() + channel();
        kernels().find_bytes(block_.bytes, escapes, steps, found);
        const uint32_t active = ~uint32_t{0} >> (kLanes - lanes_);
        StreamReader& reader = cursors_[0].reader();
        for (size_t step = 0; step < steps; ++step) {
            for (uint32_t lanes = found[step] & active; lanes; lanes &= lanes - 1) {
                const uint8_t value = reader.next_escaped(escapes[step], step_ + step);
                if (value > 2 * kMaxCoarse) refuse_digit("symbol of pass 0", value, "0 to 254");
                block_.bytes[step * kLanes + static_cast<unsigned>(std::countr_zero(lanes))] =
                    value;
            }
        }
    }

    // A block of a pass that is not entropy-coded.
    void read_plain(unsigned j, size_t steps) {
        const std::span<const uint8_t> body = group_->group.passes[j].bytes;
        const BlockRows rows(group_->shape, step_);
        if (group_->group.passes[j].kind == PassKind::Bytes) {
            kernels().gather(body.data() + rows.begin, rows.stride, lanes_, steps, block_.bytes);
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

    void finish() {
        const PlaneTarget& plane = group_->group.planes[unit_.plane];
        std::array<std::byte*, kLanes> rows{};
        for (unsigned lane = 0; lane < lanes_; ++lane) {
            const uint64_t token = lane * group_->shape.places() + place_;
            const int64_t offset = plane.offsets[token];
            if (offset == kSkippedToken) continue;
            if (!group_->is_exempt.empty() && group_->is_exempt[token]) continue;
            rows[lane] = plane.data + offset + unit_.head * plane.head_stride;
        }
        UnitJob job{};
        job.values = values_.get();
        job.size = unit_.size;
        job.scaling = plane.is_value ? group_->group.value_scaling : group_->group.key_scaling;
        job.early_offset = group_->early_offset.data() + unit_.begin;
        job.late_offset = group_->late_offset.data() + unit_.begin;
        job.mean = group_->mean.data() + unit_.begin;
        if (plane.rope >= 0) add_rope(plane, job);
        job.rows = rows.data();
        const auto address = reinterpret_cast<uintptr_t>(scratch_.get());
        job.scratch = scratch_.get() + (-address & 63);
        kernels().finish_unit[static_cast<size_t>(work_.type)](job);
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
    std::shared_ptr<const PreparedGroup> group_;
    std::array<PassCursor, kMaxPasses> cursors_;
    uint64_t step_ = 0, end_ = 0, place_ = 0;
    unsigned lanes_ = 0;
    Unit unit_{};
    uint32_t done_ = 0;  // steps of the unit decoded so far
    uint32_t room_ = 0;  // largest unit so far
    std::unique_ptr<int16_t[]> values_;
    std::unique_ptr<std::byte[]> scratch_;
    uint64_t rope_place_ = UINT64_MAX;
    uint32_t rope_plane_ = 0;
    const float* angles_ = nullptr;
    std::vector<float> rope_scratch_;
    Block block_, contexts_;
};

// Hands out items, group by group; a group is made ready when its first item is asked for.
class ItemQueue {
public:
    explicit ItemQueue(const FusedDecode& work) : work_(work) {}

    bool start_next(Strand& strand) {
        while (!group_ || item_ + 1 >= group_->boundaries.size()) {
            group_.reset();
            if (next_group_ == work_.groups.size()) return false;
            const FusedGroup& source = work_.groups[next_group_++];
            group_ = std::make_shared<const PreparedGroup>(work_, source);
            item_ = 0;
            if (group_->shape.steps() == 0) group_.reset();
        }
        strand.start(group_, item_++);
        return true;
    }

private:
    const FusedDecode& work_;
    std::shared_ptr<const PreparedGroup> group_;
    size_t next_group_ = 0, item_ = 0;
};

// Decodes one block of every strand, pass by pass, side by side.
void decode_block(std::span<Strand*> strands, const AliasTable* coarse, unsigned coarse_buckets,
                  const AliasTable* refine) {
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
        if (count)
            kernels().decode_runs(j ? refine : coarse, j ? kContextBuckets : coarse_buckets,
                                  runs.data(), count, steps);
        for (Strand* strand : strands)
            if (j < strand->passes()) strand->end_pass(j, steps);
    }
    for (Strand* strand : strands) strand->end_block(steps);
}

}  // namespace

void decode_groups(const FusedDecode& work) {
    RopeCache ropes(work.ropes);
    for (const FusedGroup& group : work.groups)
        for (const PlaneTarget& plane : group.planes)
            if (plane.rope < static_cast<int>(work.ropes.size()))
                ropes.prepare(plane, {group.tokens, group.channels});
    require(work.coarse.count() == kFamilies * kTableRows &&
                work.refine.count() == 2 * kFamilies * kTableRows &&
                work.refine.alphabet() <= 3 && !work.refine.any_escape(),
            "tables", "others", "those of the ladder");
    const unsigned buckets = work.coarse.buckets();
    const AliasTable* const coarse = work.coarse.alias(buckets);
    const AliasTable* const refine = work.refine.alias(kContextBuckets);

    ItemQueue queue(work);
    std::vector<std::unique_ptr<Strand>> strands;
    for (size_t i = 0; i < kGroupStreams; ++i)
        strands.push_back(std::make_unique<Strand>(work, ropes));
    while (true) {
        std::array<Strand*, kGroupStreams> busy;
        size_t count = 0;
        for (const auto& strand : strands)
            if (!strand->is_idle() || queue.start_next(*strand)) busy[count++] = strand.get();
        if (!count) return;
        decode_block(std::span(busy).first(count), coarse, buckets, refine);
    }
}

}  // namespace cachegen
