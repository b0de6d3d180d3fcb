// One group of an object, made ready to be decoded: checked, its streams found, its constants per
// channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.h"
#include "format.h"
#include "fused_decode.h"
#include "segment_layout.h"
#include "sparse.h"

namespace cachegen {

// A run of channels that is finished as a whole, because RoPE needs all of it: one head.
struct Unit {
    uint32_t begin, size;
    uint32_t plane, head;
    size_t lookup;  // where its rows begin in PreparedGroup::lookup
};

struct alignas(64) CacheLine {
    std::byte bytes[64];
};

struct PreparedGroup {
    const FusedGroup& group;
    Shape shape;
    std::vector<std::vector<StreamLayout>> streams;  // of every pass; none unless it is rANS
    std::vector<std::vector<uint16_t>> models;       // of every pass, one per channel
    std::vector<SparseSymbol> sparse;                // of pass 0, if it is sparse
    std::vector<uint8_t> escapes;                    // of pass 0, one per channel
    std::vector<float> early_offset, late_offset, mean;
    std::unique_ptr<CacheLine[]> lookup;  // UnitJob::lookup of all units, or null
    std::vector<bool> is_exempt;  // by token, or empty
    std::vector<Unit> units;
    std::vector<uint32_t> unit_of;     // by channel
    std::vector<uint64_t> boundaries;  // steps where an item may begin, and the end

    // Exempt tokens are stored at once. Throws Error.
    PreparedGroup(const FusedDecode& work, const FusedGroup& source, const Kernels& kernel);

    // Whether nearly all values are 0: heads are finished by MeanRows.
    bool is_sparse() const;

    // A job for a unit, but for what depends on the place.
    UnitJob job_of(const Unit& unit) const;

private:
    void check(const FusedDecode& work) const;
    void find_units();
    void fill_constants(const FusedDecode& work);
    void fill_lookup(const FusedDecode& work, const Kernels& kernel);
    void find_streams();
    void find_boundaries();
    void store_exempt(const FusedDecode& work) const;
};

// Whether RoPE turns anything of a plane: a kind without frequencies does not.
bool turns(const FusedDecode& work, const PlaneTarget& plane);

// Throws Error (Geometry) unless sound.
void require(bool sound, const char* what, const std::string& got, const std::string& expected);

}  // namespace cachegen
