// Rows of values as symbols and mantissas, for `lossless`: plain C++ for the compiler to vectorise;
// see quantize_rows.h.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "lossless.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

template <KVType kType>
uint32_t survey_row(const void* values, size_t size, void* top, void* negative) {
    using Bits = typename KVTraits<kType>::Bits;
    constexpr FloatFields fields = fields_of(kType);
    const auto* const bits = static_cast<const Bits*>(values);
    auto* const __restrict largest = static_cast<Bits*>(top);
    auto* const __restrict signs = static_cast<Bits*>(negative);
    Bits seen = 0;
    for (size_t i = 0; i < size; ++i) {
        const auto exponent = static_cast<Bits>((bits[i] & KVTraits<kType>::kMagnitude) >> fields.mantissa);
        const auto finite = static_cast<Bits>(exponent == fields.infinite() ? 0 : exponent);
        largest[i] = std::max(largest[i], finite);
        signs[i] = static_cast<Bits>(signs[i] + (bits[i] >> (fields.exponent + fields.mantissa)));
        seen = static_cast<Bits>(seen | bits[i]);
    }
    return seen;
}

template <KVType kType>
unsigned part_row(const LosslessRow& row, const void* values) {
    using Bits = typename KVTraits<kType>::Bits;
    constexpr FloatFields fields = fields_of(kType);
    const auto* const bits = static_cast<const Bits*>(values);
    // Copies, as bytes that are written may be anything, the row itself too.
    const uint8_t *const top = row.top, *const flip = row.flip;
    uint8_t* const __restrict symbols = row.symbols;
    const size_t size = row.size;
    uint8_t largest = 0;
    for (size_t i = 0; i < size; ++i) {
        const auto exponent = static_cast<Bits>((bits[i] & KVTraits<kType>::kMagnitude) >> fields.mantissa);
        const auto sign = static_cast<Bits>(bits[i] >> (fields.exponent + fields.mantissa));
        // Below 0 for infinities above the top, which are listed all the same.
        const auto below = static_cast<Bits>(top[i] + 1u - exponent);
        const bool listed = below >= kListedDistance || exponent == fields.infinite();
        const auto nonzero = static_cast<Bits>(listed ? kListedDistance : below);
        const auto distance = static_cast<Bits>(exponent ? nonzero : 0);
        const auto symbol = static_cast<uint8_t>(2 * distance + (sign ^ flip[i]));
        symbols[i] = symbol;
        largest = std::max(largest, symbol);
    }
    constexpr Bits mantissa = static_cast<Bits>((1u << fields.mantissa) - 1);
    for (unsigned byte = 0; byte < row.bytes; ++byte) {
        uint8_t* const __restrict out = row.mantissas[byte];
        const unsigned shift = row.left_out + 8 * byte;
        for (size_t i = 0; i < size; ++i)
            out[i] = static_cast<uint8_t>((bits[i] & mantissa) >> shift);
    }
    return largest;
}

template <KVType kType>
unsigned join_row(const LosslessRow& row, void* values) {
    using Bits = typename KVTraits<kType>::Bits;
    constexpr FloatFields fields = fields_of(kType);
    const uint8_t *const top = row.top, *const flip = row.flip, *const symbols = row.symbols;
    auto* const __restrict bits = static_cast<Bits*>(values);
    const size_t size = row.size;
    uint8_t wrong = 0, listed = 0;
    for (size_t i = 0; i < size; ++i) {
        const auto distance = static_cast<uint8_t>(symbols[i] >> 1);
        const auto is_listed = static_cast<uint8_t>(distance == kListedDistance);
        listed = static_cast<uint8_t>(listed | is_listed);
        wrong = static_cast<uint8_t>(wrong | (distance > top[i] && !is_listed));
        const auto exponent = static_cast<Bits>(top[i] + 1 - distance);
        const auto sign = static_cast<Bits>((symbols[i] & 1) ^ flip[i]);
        const auto field = static_cast<Bits>(distance == 0 || is_listed ? 0 : exponent);
        bits[i] = static_cast<Bits>(Bits(sign << (fields.exponent + fields.mantissa)) |
                                    Bits(field << fields.mantissa));
    }
    for (unsigned byte = 0; byte < row.bytes; ++byte) {
        const uint8_t* const part = row.mantissas[byte];
        const unsigned shift = row.left_out + 8 * byte;
        for (size_t i = 0; i < size; ++i)
            bits[i] = static_cast<Bits>(bits[i] | Bits(Bits{part[i]} << shift));
    }
    return (wrong ? kWrongDistance : 0) | (listed ? kAnyListed : 0);
}

template <KVType kType>
constexpr LosslessRows lossless_rows() {
    return {survey_row<kType>, part_row<kType>, join_row<kType>};
}

}  // namespace
}  // namespace cachegen
