#include "fused_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "crew.h"
#include "dispatch.h"
#include "prepared_group.h"
#include "rope_cache.h"
#include "strand.h"

namespace cachegen {
namespace {

// Starting a thread takes as long as decoding about this many values.
constexpr uint64_t kValuesPerThread = 1 << 17;

// Hands out items, group by group, to all threads; a group is made ready when its first item is
// asked for.
class ItemQueue {
public:
    ItemQueue(const FusedDecode& work, const Kernels& kernel) : work_(work), kernel_(kernel) {
        for (const FusedGroup& group : work.groups) order_.push_back(&group);
        const auto has_more = [](const FusedGroup* a, const FusedGroup* b) {
            return std::ranges::lexicographical_compare(b->passes, a->passes, {}, coding, coding);
        };
        std::ranges::stable_sort(order_, has_more);
    }

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
                std::make_shared<const PreparedGroup>(work_, *order_[next], kernel_);
            hand.item = 0;
            if (hand.group->shape.steps() == 0) hand.group.reset();
        }
        strand.start(hand.group, hand.item++);
        return true;
    }

    static int coding(const PassBody& pass) { return pass.kind == PassKind::Rans ? 2 : 1; }

    const FusedDecode& work_;
    const Kernels& kernel_;
    // Groups whose passes are coded alike follow one another: a kernel that decodes four streams
    // takes as long for one.
    std::vector<const FusedGroup*> order_;
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
                work.refine.alphabet() <= 3 && !work.refine.any_escape() &&
                !work.coarse.any_certain() && !work.refine.any_certain(),
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
        Scratch scratch;
        std::vector<std::unique_ptr<Strand>> strands;
        for (size_t i = 0; i < kGroupStreams; ++i)
            strands.push_back(std::make_unique<Strand>(work, ropes, kernel, scratch));
        try {
            while (true) {
                std::array<Strand*, kGroupStreams> busy;
                size_t count = 0;
                for (const auto& strand : strands)
                    if (!strand->is_idle() || queue.start_next(*strand, hand))
                        busy[count++] = strand.get();
                if (!count) break;
                decode_block(std::span(busy).first(count), coders);
            }
        } catch (...) {
            queue.stop();
            throw;
        }
        // Rows went past the caches: they are in memory before anybody hears that they are done.
        std::atomic_thread_fence(std::memory_order_seq_cst);
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
