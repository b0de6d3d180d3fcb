#include "transform_decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <span>
#include <string>

#include "crew.h"
#include "dispatch.h"
#include "error.h"
#include "prepared_group.h"
#include "rope_cache.h"
#include "rows_convert.h"
#include "strand.h"

namespace cachegen {
namespace {

// Values decoded at a time, bytes; a larger group goes alone. A small one alone has too few streams
// to decode side by side.
constexpr size_t kBatchBytes = size_t{1} << 20;

void check(const TransformGroup& group, const FusedDecode& work) {
    const auto& heads = group.basis->heads();
    size_t head = 0, begin = 0;
    for (const PlaneTarget& plane : group.planes) {
        const bool known = plane.rope < static_cast<int>(work.ropes.size());
        require(known, "RoPE kind", std::to_string(plane.rope), "one that exists");
        if (plane.rope >= 0) {
            const size_t half = work.ropes[static_cast<size_t>(plane.rope)].frequencies.size();
            if (2 * half > plane.dim)
                throw Error(ErrorKind::Corrupt, "RoPE frequencies", std::to_string(half),
                            "up to half of " + std::to_string(plane.dim));
        }
        for (uint32_t i = 0; i < plane.heads; ++i, ++head, begin += plane.dim)
            require(head < heads.size() && heads[head].dim == plane.dim, "heads of the basis",
                    std::to_string(heads.size()), "those of the planes");
    }
    require(head == heads.size() && begin == group.decoded.channels, "channels of the planes",
            std::to_string(begin), std::to_string(group.decoded.channels));
}

// Memory that grows, at a cache line; what is in it is lost when it does.
class Room {
public:
    void reserve(size_t bytes) {
        if (bytes <= room_) return;
        lines_ = std::make_unique_for_overwrite<CacheLine[]>(ceil_div(bytes, sizeof(CacheLine)));
        room_ = bytes;
    }
    std::byte* data() const { return lines_.get()->bytes; }

private:
    size_t room_ = 0;
    std::unique_ptr<CacheLine[]> lines_;
};

// The values of one group.
class GroupValues {
public:
    explicit GroupValues(const TransformGroup& group)
        : group(group), shape{group.decoded.tokens, group.decoded.channels} {}

    static size_t bytes_of(const TransformGroup& group) {
        const Shape shape{group.decoded.tokens, group.decoded.channels};
        return shape.steps() * kLanes * sizeof(int16_t);
    }

    // What the decoder is to fill: rows for all components, place by place.
    FusedGroup open(int16_t* values) {
        values_ = values;
        target_ = {nullptr, nullptr, values};
        FusedGroup open = group.decoded;
        open.coefficients = &target_;
        return open;
    }

    const int16_t* rows(uint64_t place) const {
        return values_ + place * shape.channels * kLanes;
    }

    const TransformGroup& group;
    Shape shape;

private:
    int16_t* values_ = nullptr;
    ComponentTarget target_{};
};

// Sets up the registers that a kernel needs.
class TileScope {
public:
    explicit TileScope(const ProductKernel& kernel) : kernel_(kernel) { kernel.begin(); }
    ~TileScope() { kernel_.end(); }
    TileScope(const TileScope&) = delete;

private:
    const ProductKernel& kernel_;
};

// One thread's way from values to planes.
class Transformer {
public:
    Transformer(const FusedDecode& work, const RopeCache& ropes, const ProductKernel& kernel)
        : work_(work), ropes_(ropes), kernel_(kernel) {}

    // Heads that share components: `first` to `last` of a group.
    void finish(const GroupValues& values, size_t first, size_t last) {
        const PackedBasis& basis = *values.group.basis;
        const PackedBasis::Cells& cells = basis.cells(kernel_.form);
        fill_scales(values, cells, basis.heads()[first]);
        for (places_.first = 0; places_.first < values.shape.places(); places_.first = places_.last) {
            places_.last = std::min<size_t>(places_.first + kPlaces, values.shape.places());
            finish_places(values, cells, first, last);
        }
    }

private:
    // Places whose components are ready at a time: those of 256 tokens.
    static constexpr size_t kPlaces = 8;

    void finish_places(const GroupValues& values, const PackedBasis::Cells& cells, size_t first,
                       size_t last) {
        const PackedBasis& basis = *values.group.basis;
        expand(values, basis.heads()[first]);
        size_t plane = 0, before = 0;
        for (size_t head = first; head < last; ++head) {
            while (head - before >= values.group.planes[plane].heads)
                before += values.group.planes[plane++].heads;
            enter(values, plane);
            finish_head(values, cells, head, head - before, head + 1 < basis.heads().size());
        }
    }

    // What turns values into components, for the slots of a block.
    void fill_scales(const GroupValues& values, const PackedBasis::Cells& cells,
                     const BasisHead& head) {
        const FusedGroup& from = values.group.decoded;
        const size_t slots = head.blocks * kSlotBlock;
        scales_.resize(slots);
        tables_.resize(slots);
        components_.resize(slots);
        for (size_t s = 0; s < slots; ++s) {
            const size_t slot = head.first_block * kSlotBlock + s;
            const uint32_t component = values.group.basis->components()[slot];
            scales_[s] = {};
            components_[s] = 0;  // any, where the scales are 0
            if (component == kNoSlot) continue;
            components_[s] = component;
            const size_t scale_class = from.side.classes[component] % kClasses;
            const float gain = cells.gains[slot];
            scales_[s] = {from.key_scaling.early_scale * gain, from.key_scaling.late_scale * gain,
                          from.early_offset[scale_class] * gain,
                          from.late_offset[scale_class] * gain};
        }
        kernel_.fill_tables(scales_.data(), slots, from.key_scaling.late_below, tables_.data());
    }

    // Makes all components of a block ready, place by place.
    void expand(const GroupValues& values, const BasisHead& head) {
        const int late_below = values.group.decoded.key_scaling.late_below;
        const size_t places = places_.last - places_.first;
        expanded_.reserve(places * head.blocks * kExpandedBytes);
        active_.resize(places * head.blocks);
        counts_.assign(places, 0);
        for (size_t place = 0; place < places; ++place) {
            for (size_t block = 0; block < head.blocks; ++block) {
                const size_t slot = block * kSlotBlock;
                const bool is_active = kernel_.expand(
                    {values.rows(places_.first + place), components_.data() + slot, scales_.data() + slot,
                     tables_.data() + slot, late_below,
                     expanded_.data() + (place * head.blocks + block) * kExpandedBytes});
                if (is_active)
                    active_[place * head.blocks + counts_[place]++] = static_cast<uint16_t>(block);
            }
        }
    }

    // Finds out where the tokens of a plane go, and what it has for RoPE.
    void enter(const GroupValues& values, size_t index) {
        const PlaneTarget& plane = values.group.planes[index];
        plane_ = index;
        if (&plane == entered_) return;
        entered_ = &plane;
        const uint64_t places = values.shape.places();
        const GroupSide& side = values.group.decoded.side;
        rows_.assign(places * kLanes, nullptr);
        std::vector<bool> exempt(side.exempt_count() ? values.shape.tokens : 0);
        for (size_t i = 0; i < side.exempt_count(); ++i) exempt[side.exempt_token(i)] = true;
        for (uint64_t place = 0; place < places; ++place) {
            for (unsigned i = 0; i < values.shape.active_lanes(place); ++i) {
                const uint64_t token = i * places + place;
                const int64_t offset = plane.offsets[token];
                if (offset == kSkippedToken || (!exempt.empty() && exempt[token])) continue;
                rows_[place * kLanes + place_of_lane(i)] = plane.data + offset;
            }
        }
    }

    // Elements of 16 bits come as those of the even lanes and those of the odd ones.
    unsigned place_of_lane(unsigned lane) const {
        return work_.type == KVType::Float32 ? lane : lane / 2 + lane % 2 * 16;
    }

    void finish_head(const GroupValues& values, const PackedBasis::Cells& cells, size_t index,
                     size_t head_of_plane, bool has_next) {
        const PackedBasis& basis = *values.group.basis;
        const BasisHead& head = basis.heads()[index];
        const PlaneTarget& plane = values.group.planes[plane_];
        const float factor = values.group.factors[plane_];
        const size_t places = places_.last - places_.first;
        sums_.resize(head.channel_blocks() * kChannelBlock * kLanes);
        mean_.resize(head.dim);
        for (size_t d = 0; d < head.dim; ++d)
            mean_[d] = values.group.mean[head.begin + d] * factor;
        MultiplyJob multiply{};
        multiply.basis = cells.bytes.data() + cells.heads[index];
        if (has_next) multiply.next = cells.bytes.data() + cells.heads[index + 1];
        multiply.shares = places;
        multiply.cell_bytes = cells.cell_bytes;
        multiply.slot_blocks = head.blocks;
        multiply.channel_blocks = head.channel_blocks();
        multiply.has_low = cells.has_low;
        multiply.out = sums_.data();
        FinishJob finish{sums_.data(), factor, {}};
        finish.unit.size = head.dim;
        finish.unit.mean = mean_.data();
        finish.unit.scratch = scratch_.reserve(static_cast<uint32_t>(head.dim), work_.type);
        std::array<std::byte*, kLanes> rows;
        finish.unit.rows = rows.data();
        const bool turned = turns(work_, plane);
        for (size_t place = 0; place < places; ++place) {
            multiply.share = place;
            multiply.components = expanded_.data() + place * head.blocks * kExpandedBytes;
            multiply.active = active_.data() + place * head.blocks;
            multiply.count = counts_[place];
            kernel_.multiply(multiply);
            for (unsigned lane = 0; lane < kLanes; ++lane) {
                std::byte* const row = rows_[(places_.first + place) * kLanes + lane];
                rows[lane] = row ? row + static_cast<int64_t>(head_of_plane) * plane.head_stride
                                 : nullptr;
            }
            if (turned) {
                const RopeKind& kind = ropes_.kind(plane.rope);
                finish.unit.half = kind.frequencies.size();
                finish.unit.interleaved = kind.interleaved;
                finish.unit.cos = ropes_.angles(plane, values.shape, places_.first + place, angles_);
                finish.unit.sin = finish.unit.cos + finish.unit.half * kLanes;
            }
            kernel_.finish[static_cast<size_t>(work_.type)](finish);
        }
    }

    const FusedDecode& work_;
    const RopeCache& ropes_;
    const ProductKernel& kernel_;
    struct {
        size_t first, last;
    } places_{};
    size_t plane_ = 0;
    const PlaneTarget* entered_ = nullptr;
    std::vector<std::byte*> rows_;  // of the tokens of a plane, head 0; in the order of elements
    AlignedVector<SlotScale> scales_;
    AlignedVector<SlotTable> tables_;
    Room expanded_;
    std::vector<uint32_t> components_;  // of the slots
    std::vector<uint16_t> active_;
    std::vector<size_t> counts_;
    AlignedVector<float> sums_;
    std::vector<float> mean_, angles_;
    Scratch scratch_;
};

void store_exempt(const TransformGroup& group, const FusedDecode& work) {
    const GroupSide& side = group.decoded.side;
    const size_t width = work.stored == KVType::Float32 ? 4 : 2;
    const auto* row = reinterpret_cast<const std::byte*>(side.rows.data());
    for (size_t i = 0; i < side.exempt_count(); ++i) {
        for (const PlaneTarget& plane : group.planes) {
            const int64_t offset = plane.offsets[side.exempt_token(i)];
            for (uint32_t head = 0; head < plane.heads; ++head, row += plane.dim * width)
                if (offset != kSkippedToken)
                    convert_row(work.stored, row, work.type,
                                plane.data + offset + head * plane.head_stride, plane.dim);
        }
    }
}

// Decodes some groups, first their values, then their planes.
class Batch {
public:
    Batch(const FusedDecode& work, const RopeCache& ropes, const ProductKernel& kernel,
          size_t threads)
        : work_(work), kernel_(kernel) {
        for (size_t i = 0; i < threads; ++i)
            transformers_.push_back(std::make_unique<Transformer>(work, ropes, kernel));
    }

    void decode(std::span<const TransformGroup> groups) {
        const size_t threads = transformers_.size();
        FusedDecode values{work_.type,   work_.stored, work_.passes, work_.coarse,
                           work_.refine, threads,      {},           {}};
        std::vector<std::unique_ptr<GroupValues>> open;
        std::vector<Item> items;
        size_t bytes = 0, begin = 0;
        for (const TransformGroup& group : groups) bytes += GroupValues::bytes_of(group);
        values_.reserve(bytes);
        for (const TransformGroup& group : groups) {
            open.push_back(std::make_unique<GroupValues>(group));
            values.groups.push_back(
                open.back()->open(reinterpret_cast<int16_t*>(values_.data() + begin)));
            begin += GroupValues::bytes_of(group);
            const size_t heads = group.basis->heads().size();
            const size_t step = group.basis->is_joint() ? heads : 1;
            for (size_t head = 0; head < heads && group.decoded.tokens; head += step)
                items.push_back({open.back().get(), head, head + step});
        }
        decode_groups(values);
        std::atomic<size_t> next = 0;
        run_crew(std::min(threads, items.size()), [&](size_t index) {
            const TileScope scope(kernel_);
            for (size_t i = next++; i < items.size(); i = next++)
                transformers_[index]->finish(*items[i].values, items[i].first, items[i].last);
            // Rows went past the caches: they are in memory before anybody hears of it.
            std::atomic_thread_fence(std::memory_order_seq_cst);
        });
        for (const TransformGroup& group : groups) store_exempt(group, work_);
    }

private:
    struct Item {
        const GroupValues* values;
        size_t first, last;  // heads
    };

    const FusedDecode& work_;
    const ProductKernel& kernel_;
    Room values_;
    std::vector<std::unique_ptr<Transformer>> transformers_;
};

}  // namespace

void decode_transformed(const TransformDecode& decode) {
    const FusedDecode& work = decode.work;
    const ProductKernel* const kernel = product_kernel(work.type);
    if (!kernel)
        throw Error(ErrorKind::Config, "product kernel", "none for this processor", "AVX-512");
    RopeCache ropes(work.ropes, kernels().angle_lanes);
    for (const TransformGroup& group : decode.groups) {
        check(group, work);
        const Shape shape{group.decoded.tokens, group.decoded.channels};
        for (const PlaneTarget& plane : group.planes) ropes.prepare(plane, shape);
    }
    // With many groups every thread takes its own, else they share the work of some.
    const std::span<const TransformGroup> groups = decode.groups;
    const bool apart = groups.size() >= 2 * work.threads;
    const size_t together = apart ? 1 : work.threads;
    std::vector<std::span<const TransformGroup>> batches;
    size_t begin = 0, bytes = 0;
    for (size_t i = 0; i < groups.size(); ++i) {
        const size_t more = GroupValues::bytes_of(groups[i]);
        if (i > begin && bytes + more > kBatchBytes * together) {
            batches.push_back(groups.subspan(begin, i - begin));
            begin = i;
            bytes = 0;
        }
        bytes += more;
    }
    if (begin < groups.size()) batches.push_back(groups.subspan(begin));
    std::atomic<size_t> next = 0;
    run_crew(apart ? std::min(work.threads, batches.size()) : 1, [&](size_t) {
        Batch batch(work, ropes, *kernel, together);
        try {
            for (size_t i = next++; i < batches.size(); i = next++) batch.decode(batches[i]);
        } catch (...) {
            next = batches.size();
            throw;
        }
    });
}

}  // namespace cachegen
