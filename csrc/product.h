// The product of components by a basis, one head and 32 tokens at a time, and what goes before and
// after it. docs/fused-decode.md, "With a profile", has the layouts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "float_bits.h"
#include "format.h"
#include "ladder.h"

namespace cachegen {

// Components are multiplied by blocks of so many, channels made by blocks of so many.
inline constexpr size_t kSlotBlock = 32, kChannelBlock = 32;
// What a kernel makes of a block of components of 32 tokens, whatever it is.
inline constexpr size_t kExpandedBytes = kSlotBlock * kLanes * 4;
// A component that makes no channel has no slot.
inline constexpr uint32_t kNoSlot = UINT32_MAX;

// How a basis is packed: floats, or tiles of bfloat16.
enum class BasisForm : uint8_t { Floats, Tiles };

// What turns the values of one slot into a float: v * scale + sign(v) * offset, or 0.
struct SlotScale {
    float early_scale, late_scale, early_offset, late_offset;
};

// What a kernel looks values from -16 to 15 up in, by their low five bits.
struct alignas(64) SlotTable {
    std::byte bytes[128];
};

// One block of slots of 32 tokens.
struct ExpandJob {
    const int16_t* values;       // rows of all components
    const uint32_t* components;  // kSlotBlock: which row is whose
    const SlotScale* scales;  // kSlotBlock
    const SlotTable* tables;  // kSlotBlock
    int late_below;
    std::byte* out;  // kExpandedBytes
};

// One head of 32 tokens: out = basis * components.
struct MultiplyJob {
    const std::byte* basis;       // of the head: a row of `slot_blocks` cells per block of channels
    const std::byte* next;        // of the head that follows, to be fetched by and by, or null
    size_t share, shares;         // which part of it
    size_t cell_bytes;
    size_t slot_blocks, channel_blocks;
    bool has_low;                 // tiles have low parts too
    const std::byte* components;  // kExpandedBytes for each block of slots
    const uint16_t* active;       // blocks that are not 0
    size_t count;
    float* out;  // rows of kLanes floats: those of the even lanes, then those of the odd ones
};

// Rows of floats as `MultiplyJob::out` has them to their destination: x * factor + mean, RoPE,
// rounding. Of UnitJob everything counts but the values, scales and lookups.
struct FinishJob {
    const float* values;
    float factor;
    UnitJob unit;
};

struct ProductKernel {
    BasisForm form;
    // Around the work of a thread.
    void (*begin)();
    void (*end)();
    void (*fill_tables)(const SlotScale* scales, size_t count, int late_below, SlotTable* tables);
    // Returns whether anything is not 0; if nothing is, it writes nothing.
    bool (*expand)(const ExpandJob& job);
    void (*multiply)(const MultiplyJob& job);
    void (*finish[kKVTypes])(const FinishJob& job);
};

// The kernel for a type of targets, or null: then whoever asks has to multiply by other means.
const ProductKernel* product_kernel(KVType type);

// Whether tiles may be used; they are unless CACHEGEN_TILES is 0. Returns what was so before.
bool allow_tiles(bool allowed);

#if CACHEGEN_X86_KERNELS
extern const ProductKernel kProductAvx512, kProductTiles;
bool has_tiles();  // asks the system for their registers
#endif

}  // namespace cachegen
