#include "packed_basis.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "float_bits.h"
#include "prepared_group.h"

namespace cachegen {
namespace {

constexpr size_t kTileRows = 16, kTileBytes = 1024;
constexpr float kLevels = 127;  // of a profile's vectors

uint16_t high_part(float value) { return KVTraits<KVType::BFloat16>::from_float(value); }
float as_float(uint16_t part) { return KVTraits<KVType::BFloat16>::to_float(part); }

}  // namespace

PackedBasis::PackedBasis(const float* values, size_t channels, std::span<const uint32_t> dims)
    : values_(values), channels_(channels) {
    find_heads(dims);
    const size_t end = heads_.empty() ? 0 : heads_.back().begin + heads_.back().dim;
    require(end == channels && channels > 0, "channels of the heads", std::to_string(end),
            std::to_string(channels));
    // Which heads a component makes: none, one, or several.
    std::vector<size_t> head_of(channels, SIZE_MAX);
    is_joint_ = heads_.size() == 1;
    for (size_t h = 0; h < heads_.size(); ++h) {
        for (size_t d = heads_[h].begin; d < heads_[h].begin + heads_[h].dim; ++d) {
            const float* const row = values_ + d * channels;
            for (size_t c = 0; c < channels; ++c) {
                if (row[c] == 0) continue;
                is_joint_ |= head_of[c] != SIZE_MAX && head_of[c] != h;
                head_of[c] = h;
            }
        }
    }
    for (size_t h = 0; h < (is_joint_ ? 1 : heads_.size()); ++h) {
        std::vector<uint32_t> made_of;
        for (uint32_t c = 0; c < channels; ++c)
            if (is_joint_ ? head_of[c] != SIZE_MAX : head_of[c] == h) made_of.push_back(c);
        heads_[h].first_block = slot_blocks();
        add_slots(made_of);
        heads_[h].blocks = slot_blocks() - heads_[h].first_block;
    }
    if (is_joint_)
        for (BasisHead& head : heads_) head.blocks = slot_blocks();
}

void PackedBasis::find_heads(std::span<const uint32_t> dims) {
    size_t begin = 0;
    for (const uint32_t dim : dims) {
        require(dim > 0 && dim <= channels_ - begin, "dimension of a head", std::to_string(dim),
                "1 to " + std::to_string(channels_ - begin));
        heads_.push_back({begin, dim, 0, 0});
        begin += dim;
    }
}

// Blocks are filled up with slots of no component.
void PackedBasis::add_slots(const std::vector<uint32_t>& components) {
    components_.insert(components_.end(), components.begin(), components.end());
    while (components_.size() % kSlotBlock) components_.push_back(kNoSlot);
}

float PackedBasis::value(size_t channel, size_t slot) const {
    const uint32_t component = components_[slot];
    return component == kNoSlot ? 0.0f : values_[channel * channels_ + component];
}

// What is left of a column is whole numbers up to 127, which a bfloat16 holds, if it is divided by
// this; 0 if there is no such number. Profiles without a metric have only such columns.
float PackedBasis::exact_gain(size_t slot, const BasisHead& head) const {
    const size_t begin = is_joint_ ? 0 : head.begin;
    const size_t end = is_joint_ ? channels_ : head.begin + head.dim;
    float largest = 0;
    for (size_t d = begin; d < end; ++d) largest = std::max(largest, std::fabs(value(d, slot)));
    if (largest == 0) return 1;
    const float about = largest / kLevels;
    for (const float gain : {about, std::nextafter(about, 0.0f), std::nextafter(about, 2 * about)}) {
        bool exact = true;
        for (size_t d = begin; d < end && exact; ++d)
            exact = std::rint(value(d, slot) / gain) * gain == value(d, slot);
        if (exact) return gain;
    }
    return 0;
}

const PackedBasis::Cells& PackedBasis::cells(BasisForm form) const {
    const std::lock_guard lock(mutex_);
    Cells& known = forms_[static_cast<size_t>(form)];
    if (known.heads.empty()) known = pack(form);
    return known;
}

PackedBasis::Cells PackedBasis::pack(BasisForm form) const {
    Cells cells;
    const bool tiles = form == BasisForm::Tiles;
    cells.gains.assign(components_.size(), 1.0f);
    if (tiles) {
        for (const BasisHead& head : heads_) {
            for (size_t s = 0; s < head.blocks * kSlotBlock; ++s) {
                const size_t slot = head.first_block * kSlotBlock + s;
                cells.gains[slot] = exact_gain(slot, head);
                cells.has_low |= cells.gains[slot] == 0;
            }
            if (is_joint_ || cells.has_low) break;
        }
        if (cells.has_low) cells.gains.assign(components_.size(), 1.0f);
    }
    cells.cell_bytes = tiles && !cells.has_low ? 2 * kTileBytes : 4 * kTileBytes;
    size_t size = 0;
    for (const BasisHead& head : heads_) {
        cells.heads.push_back(size);
        size += head.channel_blocks() * head.blocks * cells.cell_bytes;
    }
    cells.bytes.resize(size);
    for (size_t h = 0; h < heads_.size(); ++h) {
        const BasisHead& head = heads_[h];
        for (size_t d = 0; d < head.dim; ++d) {
            const size_t block = d / kChannelBlock, row = d % kChannelBlock;
            std::byte* const cell_row =
                cells.bytes.data() + cells.heads[h] + block * head.blocks * cells.cell_bytes;
            for (size_t s = 0; s < head.blocks * kSlotBlock; ++s) {
                const size_t slot = head.first_block * kSlotBlock + s, column = s % kSlotBlock;
                std::byte* const cell = cell_row + s / kSlotBlock * cells.cell_bytes;
                const float weight = value(head.begin + d, slot);
                if (!tiles) {
                    // 8 channels side by side for each slot.
                    const size_t at = (row / 8 * kSlotBlock + column) * 8 + row % 8;
                    std::memcpy(cell + at * sizeof weight, &weight, sizeof weight);
                    continue;
                }
                const size_t at =
                    row / kTileRows * kTileBytes + (row % kTileRows * kSlotBlock + column) * 2;
                const float scaled =
                    cells.has_low ? weight : std::rint(weight / cells.gains[slot]);
                const uint16_t high = high_part(scaled), low = high_part(scaled - as_float(high));
                std::memcpy(cell + at, &high, sizeof high);
                if (cells.has_low) std::memcpy(cell + 2 * kTileBytes + at, &low, sizeof low);
            }
        }
    }
    return cells;
}

}  // namespace cachegen
