// The basis of a group in the order that a product kernel reads it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "aligned.h"
#include "product.h"

namespace cachegen {

// A head of a plane, and the block of components that makes it. A basis that joins nothing has a
// block for each head, any other one block for all.
struct BasisHead {
    size_t begin, dim;           // channels
    size_t first_block, blocks;  // of slots
    size_t channel_blocks() const { return (dim + kChannelBlock - 1) / kChannelBlock; }
};

// Made once for a profile, used by many threads.
class PackedBasis {
public:
    // values: N x N, components to channels, alive as long as this is. dims: of all heads, in order
    // of channels. Throws Error (Geometry).
    PackedBasis(const float* values, size_t channels, std::span<const uint32_t> dims);

    struct Cells {
        AlignedVector<std::byte> bytes;
        std::vector<size_t> heads;  // where the cells of each head begin
        size_t cell_bytes = 0;
        bool has_low = false;
        std::vector<float> gains;  // of each slot: what its components are to be multiplied by
    };
    const Cells& cells(BasisForm form) const;

    size_t channels() const { return channels_; }
    size_t slot_blocks() const { return components_.size() / kSlotBlock; }
    bool is_joint() const { return is_joint_; }
    const std::vector<BasisHead>& heads() const { return heads_; }
    // Which component a slot is for; kNoSlot if none.
    const std::vector<uint32_t>& components() const { return components_; }

private:
    void find_heads(std::span<const uint32_t> dims);
    void add_slots(const std::vector<uint32_t>& components);
    float value(size_t channel, size_t slot) const;
    float exact_gain(size_t slot, const BasisHead& head) const;
    Cells pack(BasisForm form) const;

    const float* values_;
    size_t channels_;
    bool is_joint_ = true;
    std::vector<BasisHead> heads_;
    std::vector<uint32_t> components_;
    mutable std::mutex mutex_;
    mutable Cells forms_[2];
};

}  // namespace cachegen
