#include "strand.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <string>

#include "error.h"
#include "segment_layout.h"

namespace cachegen {
namespace {

int16_t value_of_symbol(unsigned symbol) {
    const int magnitude = static_cast<int>(symbol + 1) / 2;
    return static_cast<int16_t>(symbol % 2 ? -magnitude : magnitude);
}

[[noreturn]] void refuse_digit(const char* what, unsigned got, std::string expected) {
    throw Error(ErrorKind::Corrupt, what, std::to_string(got), std::move(expected));
}

}  // namespace

void PassCursor::start(const PreparedGroup& group, unsigned index, uint64_t step) {
    streams_ = group.streams[index];
    body_ = group.group.passes[index].bytes;
    end_ = UINT64_MAX;
    if (streams_.empty()) return;
    next_ = step / streams_[0].end_step;
    open_next();
}

void PassCursor::move_to(uint64_t step) {
    if (!is_rans()) return;
    reader_.check_words();
    if (step < end_) return;
    reader_.close();
    if (next_ < streams_.size()) open_next();
}

void PassCursor::open_next() {
    reader_.open(body_, streams_[next_], next_);
    end_ = streams_[next_].end_step;
    ++next_;
}

void* Scratch::reserve(uint32_t size, KVType type) {
    if (size > room_) {
        const size_t lines = type == KVType::Float32 ? 2 : 1;  // of a row of elements
        lines_ = std::make_unique<CacheLine[]>(lines * ((size_t{size} + 63) / 64 * 64));
        room_ = size;
    }
    return lines_.get();
}

// ---- Strand ------------------------------------------------------------------------------------

void Strand::start(std::shared_ptr<const PreparedGroup> group, size_t item) {
    group_ = std::move(group);
    step_ = group_->boundaries[item];
    end_ = group_->boundaries[item + 1];
    for (unsigned j = 0; j < passes(); ++j) cursors_[j].start(*group_, j, step_);
    rope_place_ = rows_place_ = UINT64_MAX;
    const auto& sparse = group_->sparse;
    const auto is_before = [](const SparseSymbol& one, uint64_t step) { return one.step < step; };
    next_sparse_ = static_cast<size_t>(
        std::lower_bound(sparse.begin(), sparse.end(), step_, is_before) - sparse.begin());
    const uint64_t channels = group_->shape.channels;
    enter_place(step_ / channels);
    unit_index_ = size_t{group_->unit_of[step_ % channels]} - 1;  // begin_unit adds 1
    begin_unit();
}

size_t Strand::steps_ahead() const {
    uint64_t end = std::min<uint64_t>(step_ + kBlockSteps, step_ + unit_.size - done_);
    for (unsigned j = 0; j < passes(); ++j) end = std::min(end, cursors_[j].end());
    return end - step_;
}

DecodeRun* Strand::begin_pass(unsigned j, size_t steps) {
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

void Strand::end_pass(unsigned j, size_t steps) {
    PassCursor& cursor = cursors_[j];
    if (group_->group.passes[j].kind == PassKind::Sparse) return read_sparse(steps);
    const bool is_rans = cursor.is_rans();
    if (is_rans)
        cursor.reader().check_words();
    else
        read_plain(j, steps);
    if (j == 0) {
        bool any_escaped = is_rans;
        if (!is_rans || !kernel_.decode_coarse) {
            kernel_.coarse_values(block_.bytes, steps, values());
            if (is_rans)
                kernel_.find_bytes(block_.bytes, group_->escapes.data() + channel(), steps,
                                   escaped_);
        } else {
            any_escaped = cursor.reader().run.any_escaped;
        }
        if (any_escaped) add_escapes(steps);
    } else if (!is_rans || !kernel_.decode_refine) {
        kernel_.refine_values(block_.bytes, power_of_three(j - 1), steps, values());
    }
}

void Strand::end_block(size_t steps) {
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

void Strand::enter_place(uint64_t place) {
    place_ = place;
    lanes_ = group_->shape.active_lanes(place);
}

// The unit behind the present one.
void Strand::begin_unit() {
    if (++unit_index_ == group_->units.size()) {
        unit_index_ = 0;
        enter_place(place_ + 1);
    }
    unit_ = group_->units[unit_index_];
    done_ = 0;
    few_.clear();
    const ComponentTarget* const to = group_->group.coefficients;
    if (to && to->values) {
        first_row_ = to->values + (place_ * group_->shape.channels + unit_.begin) * kLanes;
        return;
    }
    if (unit_.size > room_) {
        room_ = unit_.size;
        values_ = std::make_unique<CacheLine[]>(room_);
    }
    first_row_ = reinterpret_cast<int16_t*>(values_.get());
}

void Strand::add_escapes(size_t steps) {
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
                const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
                values()[step * kLanes + lane] = value_of_symbol(symbol);
            }
        }
    }
}

// A block of a pass that is not entropy-coded.
void Strand::read_plain(unsigned j, size_t steps) {
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

void Strand::read_sparse(size_t steps) {
    const bool apart = group_->is_sparse();
    if (!apart) std::memset(values(), 0, steps * kLanes * sizeof *values());
    const auto& sparse = group_->sparse;
    for (; next_sparse_ < sparse.size() && sparse[next_sparse_].step < step_ + steps;
         ++next_sparse_) {
        const SparseSymbol& one = sparse[next_sparse_];
        const auto step = static_cast<uint32_t>(one.step - step_);
        const int16_t value = value_of_symbol(one.symbol);
        if (apart)
            few_.push_back({done_ + step, one.lane, value});
        else
            values()[step * kLanes + one.lane] = value;
    }
}

// Whether the values of a unit are so few that a list of them says it all.
bool Strand::list_values() {
    if (group_->group.passes[0].kind == PassKind::Sparse) return true;
    const uint32_t active = ~uint32_t{0} >> (kLanes - lanes_);
    for (uint32_t begin = 0; begin < unit_.size; begin += kBlockSteps) {
        const auto size = std::min<uint32_t>(kBlockSteps, unit_.size - begin);
        uint32_t found[kBlockSteps];
        kernel_.find_values(row(begin), size, found);
        for (uint32_t i = 0; i < size; ++i) {
            for (uint32_t lanes = found[i] & active; lanes; lanes &= lanes - 1) {
                const auto lane = static_cast<uint8_t>(std::countr_zero(lanes));
                few_.push_back({begin + i, lane, row(begin + i)[lane]});
            }
        }
        if (few_.size() > kMostFew) return false;
    }
    return true;
}

void Strand::finish_coefficients() {
    const ComponentTarget& to = *group_->group.coefficients;
    if (to.values) return;  // that is where they are
    UnitJob job = group_->job_of(unit_);
    job.values = row(0);
    const size_t stride = group_->shape.places() * kLanes;
    float* const out = to.floats + unit_.begin * stride + place_ * kLanes;
    uint8_t used[kBlockSteps];
    kernel_.scale_rows(job, out, stride, used);
    // Another thread may be at another place of the same components.
    for (uint32_t i = 0; i < unit_.size; ++i)
        if (used[i])
            std::atomic_ref(to.used[unit_.begin + i])
                .store(1, std::memory_order_relaxed);
}

void Strand::finish() {
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
    job.scratch = scratch_.reserve(unit_.size, work_.type);
    if (group_->is_sparse() && list_values())
        return finish_means(kernel_, work_.type, job, few_, RopeCache::by_token(angles_, job.half));
    kernel_.finish_unit[static_cast<size_t>(work_.type)](job);
}

// Where the tokens of the place go, head 0.
void Strand::find_rows(const PlaneTarget& plane) {
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

void Strand::add_rope(const PlaneTarget& plane, UnitJob& job) {
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

}  // namespace cachegen
