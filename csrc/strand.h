// What is decoded side by side: runs of steps of a group, on their way through all passes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "block.h"
#include "dispatch.h"
#include "fused_decode.h"
#include "mean_rows.h"
#include "prepared_group.h"
#include "rope_cache.h"
#include "stream_reader.h"

namespace cachegen {

// One pass of an item: the streams it goes through, one after the other.
class PassCursor {
public:
    void start(const PreparedGroup& group, unsigned index, uint64_t step);

    bool is_rans() const { return !streams_.empty(); }
    uint64_t end() const { return end_; }
    StreamReader& reader() { return reader_; }

    // To be called after every block.
    void move_to(uint64_t step);

private:
    void open_next();

    std::span<const StreamLayout> streams_;
    std::span<const uint8_t> body_;
    uint64_t next_ = 0, end_ = 0;
    StreamReader reader_;
};

// Memory for the elements of one head, UnitJob::scratch. All strands of a thread share it, so that
// it stays in the first-level cache.
class Scratch {
public:
    // Room for `size` rows of kLanes elements, of the type that is the target's.
    void* reserve(uint32_t size, KVType type);

private:
    uint32_t room_ = 0;
    std::unique_ptr<CacheLine[]> lines_;
};

// One item at a time: a run of steps of one group through all its passes.
class Strand {
public:
    Strand(const FusedDecode& work, const RopeCache& ropes, const Kernels& kernel, Scratch& scratch)
        : work_(work), ropes_(ropes), kernel_(kernel), scratch_(scratch) {}

    void start(std::shared_ptr<const PreparedGroup> group, size_t item);

    bool is_idle() const { return !group_; }
    unsigned passes() const { return static_cast<unsigned>(group_->group.passes.size()); }

    // Steps that can be decoded at once: of one head, within a stream of every pass.
    size_t steps_ahead() const;

    // Makes pass j of the next `steps` ready for the kernel; returns its run, or null if the pass
    // is not rANS and `end_pass` reads it.
    DecodeRun* begin_pass(unsigned j, size_t steps);
    void end_pass(unsigned j, size_t steps);
    void end_block(size_t steps);

private:
    // With more values than these in a unit the way of all others is the shorter one.
    static constexpr size_t kMostFew = 256;

    uint64_t channel() const { return unit_.begin + done_; }
    int16_t* values() { return row(done_); }
    int16_t* row(uint32_t step) { return first_row_ + step * kLanes; }

    void enter_place(uint64_t place);
    void begin_unit();
    void add_escapes(size_t steps);
    void read_plain(unsigned j, size_t steps);
    void read_sparse(size_t steps);
    bool list_values();
    void finish();
    void finish_coefficients();
    void find_rows(const PlaneTarget& plane);
    void add_rope(const PlaneTarget& plane, UnitJob& job);

    const FusedDecode& work_;
    const RopeCache& ropes_;
    const Kernels& kernel_;
    Scratch& scratch_;
    std::shared_ptr<const PreparedGroup> group_;
    std::array<PassCursor, kMaxPasses> cursors_;
    uint64_t step_ = 0, end_ = 0, place_ = 0;
    unsigned lanes_ = 0;
    size_t unit_index_ = 0;
    Unit unit_{};
    uint32_t done_ = 0;  // steps of the unit decoded so far
    std::vector<FewValue> few_;  // of the unit, where the group is sparse
    size_t next_sparse_ = 0;  // of PreparedGroup::sparse
    uint32_t room_ = 0;  // largest unit so far
    std::unique_ptr<CacheLine[]> values_;  // a row of kLanes values each
    int16_t* first_row_ = nullptr;         // of the unit: there, or where components go
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

}  // namespace cachegen
