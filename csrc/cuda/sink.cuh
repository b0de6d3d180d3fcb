// Where decoded values go: rounding to the dtype, RoPE, and the rows of the caller's cache.
#pragma once

#include "plan.cuh"

namespace cachegen {

CACHEGEN_DEVICE unsigned size_of(uint32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// A value of the object's dtype at any alignment.
CACHEGEN_DEVICE uint32_t load_bits(uint64_t address, uint32_t dtype) {
    const uint8_t* const bytes = at_address<const uint8_t>(address);
    uint32_t bits = bytes[0] | bytes[1] << 8;
    if (dtype == kFloat32) bits |= bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
    return bits;
}

// One that lies where its type wants it.
CACHEGEN_DEVICE uint32_t load_element(uint64_t address, uint32_t dtype) {
    if (dtype == kFloat32) return *at_address<const uint32_t>(address);
    return *at_address<const uint16_t>(address);
}

CACHEGEN_DEVICE float value_of(uint32_t bits, uint32_t dtype) {
    if (dtype == kFloat32) return as_float(bits);
    return dtype == kBFloat16 ? as_float(bits << 16) : float16_value(bits);
}

CACHEGEN_DEVICE uint32_t bits_of(float value, uint32_t dtype) {
    if (dtype == kFloat32) return as_bits(value);
    return (dtype == kBFloat16 ? bfloat16_pair(value, 0.0f) : float16_pair(value, 0.0f)) & 0xffff;
}

CACHEGEN_DEVICE void store_bits(uint64_t address, uint32_t bits, uint32_t dtype) {
    if (dtype == kFloat32)
        *at_address<uint32_t>(address) = bits;
    else
        *at_address<uint16_t>(address) = static_cast<uint16_t>(bits);
}

// float16 to its finite range, for a value near the end may overshoot.
CACHEGEN_DEVICE float clamped(float value, uint32_t dtype) {
    if (dtype != kFloat16) return value;
    const float low = value < -65504.0f ? -65504.0f : value;
    return low > 65504.0f ? 65504.0f : low;
}

// Address of the values of a head of a token, or 0 where the token has no slot.
CACHEGEN_DEVICE uint64_t row_address(const Plane& plane, uint32_t token, uint32_t head) {
    const int64_t row = at_address<const int64_t>(plane.rows)[token];
    if (row < 0) return 0;
    const int64_t offset = row + static_cast<int64_t>(head) * plane.head_stride;
    return plane.base + static_cast<uint64_t>(offset) * size_of(plane.dtype);
}

// Eight values side by side; the address is a multiple of 16.
CACHEGEN_DEVICE void store_eight(uint64_t address, const float (&v)[8], uint32_t dtype) {
    uint4* const out = at_address<uint4>(address);
    if (dtype == kFloat32) {
        out[0] = uint4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])};
        out[1] = uint4{as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7])};
    } else if (dtype == kBFloat16) {
        out[0] = uint4{bfloat16_pair(v[0], v[1]), bfloat16_pair(v[2], v[3]),
                       bfloat16_pair(v[4], v[5]), bfloat16_pair(v[6], v[7])};
    } else {
        out[0] = uint4{float16_pair(v[0], v[1]), float16_pair(v[2], v[3]),
                       float16_pair(v[4], v[5]), float16_pair(v[6], v[7])};
    }
}

// The (cosine, sine) of a pair of channels of a token.
CACHEGEN_DEVICE float2 angle_of(const Plane& plane, uint32_t token, uint32_t pair) {
    const uint32_t places = (plane.tokens + kLanes - 1) / kLanes;
    const uint32_t lane = token / places, place = token % places;
    const uint64_t at = (static_cast<uint64_t>(place) * plane.half + pair) * kLanes + lane;
    return at_address<const float2>(plane.rope)[at];
}

// Which channel of the head turns with channel d, and whether d is the second of the two.
CACHEGEN_DEVICE bool partner_of(const Plane& plane, uint32_t d, uint32_t& pair, uint32_t& partner,
                                bool& is_second) {
    if (!plane.rope || d >= 2 * plane.half) return false;
    if (plane.interleaved) {
        pair = d / 2;
        is_second = d & 1;
        partner = d ^ 1u;
    } else {
        is_second = d >= plane.half;
        pair = is_second ? d - plane.half : d;
        partner = is_second ? pair : d + plane.half;
    }
    return true;
}

// Turns a channel, given its own value and that of its partner.
CACHEGEN_DEVICE float turned(float own, float partner, float2 angle, bool is_second) {
    return is_second ? sum(product(own, angle.x), product(partner, angle.y))
                     : sum(product(own, angle.x), -product(partner, angle.y));
}

// ---- Before all other kernels: slots and angles -------------------------------------------------

// One block for each Slots.
CACHEGEN_KERNEL(map_rows)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Slots& slots = at_address<const Slots>(launch.items)[block_index()];
    const int64_t* const mapping = at_address<const int64_t>(slots.mapping);
    for (uint32_t t = thread_index(); t < slots.tokens; t += 128) {
        const int64_t slot = mapping ? mapping[t] : static_cast<int64_t>(t);
        int64_t row = -1;
        if (slot >= 0 && static_cast<uint64_t>(slot) < slots.slots)
            row = slot / slots.block_slots * slots.block_stride +
                  slot % slots.block_slots * slots.slot_stride;
        else if (slot >= 0)
            atomic_or(at_address<uint32_t>(launch.errors) + slots.error, kBadSlot);
        at_address<int64_t>(slots.rows)[t] = row;
    }
}

// `extra` blocks for each Rope. Angles are float products, as models compute them.
CACHEGEN_KERNEL(rope_table)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Rope& rope = at_address<const Rope>(launch.items)[block_index() / launch.extra];
    const uint32_t size = rope.places * rope.half * kLanes;
    float2* const table = at_address<float2>(rope.table);
    for (uint32_t at = block_index() % launch.extra * 128 + thread_index(); at < size;
         at += launch.extra * 128) {
        const uint32_t lane = at % kLanes, pair = at / kLanes % rope.half;
        const uint32_t token = lane * rope.places + at / kLanes / rope.half;
        const float position = static_cast<float>(rope.position + token);
        const float frequency = at_address<const float>(rope.frequencies)[pair];
        const double angle = product(position, frequency);
        table[at] = float2{static_cast<float>(cos(angle) * rope.scale),
                           static_cast<float>(sin(angle) * rope.scale)};
    }
}

// Rows that are stored as they are replace what was decoded for them. `extra` blocks per group.
CACHEGEN_KERNEL(put_exempt)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const Group& group = at_address<const Group>(launch.groups)[launch.first + block_index() / launch.extra];
    const uint64_t size = static_cast<uint64_t>(group.exempt) * group.channels;
    for (uint64_t at = block_index() % launch.extra * 128 + thread_index(); at < size;
         at += launch.extra * 128) {
        const uint32_t channel = static_cast<uint32_t>(at % group.channels);
        const uint64_t entry = group.exempt_tokens + 4 * (at / group.channels);
        const uint32_t token = load_bits(entry, kFloat32);
        const Plane* plane = at_address<const Plane>(launch.planes) + group.plane;
        while (channel >= plane->first_channel + plane->heads * plane->dim) ++plane;
        const uint32_t inside = channel - plane->first_channel;
        const uint64_t row = row_address(*plane, token, inside / plane->dim);
        if (!row) continue;
        const unsigned size_bytes = size_of(plane->dtype);
        store_bits(row + inside % plane->dim * size_bytes,
                   load_bits(group.exempt_rows + at * size_bytes, plane->dtype), plane->dtype);
    }
}

}  // namespace cachegen
