#include "rows_convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace cachegen {
namespace {

template <class Bits>
Bits load(const std::byte* values, size_t i) {
    Bits bits;
    std::memcpy(&bits, values + i * sizeof bits, sizeof bits);
    return bits;
}

template <KVType kFrom, KVType kTo>
void convert(const std::byte* values, std::byte* out, size_t size) {
    using From = KVTraits<kFrom>;
    for (size_t i = 0; i < size; ++i) {
        float value = From::to_float(load<typename From::Bits>(values, i));
        if (kTo == KVType::Float16 && std::isfinite(value))
            value = std::clamp(value, -65504.0f, 65504.0f);
        const auto bits = KVTraits<kTo>::from_float(value);
        std::memcpy(out + i * sizeof bits, &bits, sizeof bits);
    }
}

template <KVType kType>
void add(const std::byte* others, std::byte* values, size_t size) {
    using Traits = KVTraits<kType>;
    for (size_t i = 0; i < size; ++i) {
        const auto bits =
            Traits::from_float(Traits::to_float(load<typename Traits::Bits>(values, i)) +
                               Traits::to_float(load<typename Traits::Bits>(others, i)));
        std::memcpy(values + i * sizeof bits, &bits, sizeof bits);
    }
}

}  // namespace

void convert_row(KVType from, const std::byte* values, KVType to, std::byte* out, size_t size) {
    using enum KVType;
    if (from == to) {
        std::memcpy(out, values, size * (to == Float32 ? 4 : 2));
        return;
    }
    const auto run = [&]<KVType kFrom>() {
        switch (to) {
            case Float16: return convert<kFrom, Float16>(values, out, size);
            case BFloat16: return convert<kFrom, BFloat16>(values, out, size);
            case Float32: return convert<kFrom, Float32>(values, out, size);
        }
    };
    switch (from) {
        case Float16: return run.operator()<Float16>();
        case BFloat16: return run.operator()<BFloat16>();
        case Float32: return run.operator()<Float32>();
    }
}

void add_rows(KVType type, const std::byte* others, std::byte* values, size_t size) {
    using enum KVType;
    switch (type) {
        case Float16: return add<Float16>(others, values, size);
        case BFloat16: return add<BFloat16>(others, values, size);
        case Float32: return add<Float32>(others, values, size);
    }
}

}  // namespace cachegen
