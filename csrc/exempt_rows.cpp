#include "exempt_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace cachegen {
namespace {

template <KVType kFrom, KVType kTo>
void convert_values(const uint8_t* from, std::byte* to, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        typename KVTraits<kFrom>::Bits in;
        std::memcpy(&in, from + i * sizeof in, sizeof in);
        float value = KVTraits<kFrom>::to_float(in);
        if (kTo == KVType::Float16 && std::isfinite(value))
            value = std::clamp(value, -65504.0f, 65504.0f);
        const auto out = KVTraits<kTo>::from_float(value);
        std::memcpy(to + i * sizeof out, &out, sizeof out);
    }
}

}  // namespace

void convert_exempt(const uint8_t* from, KVType stored, std::byte* to, KVType type, size_t size) {
    using enum KVType;
    if (stored == type) {
        std::memcpy(to, from, size * (type == Float32 ? 4 : 2));
        return;
    }
    const auto run = [&]<KVType kFrom>() {
        switch (type) {
            case Float16: return convert_values<kFrom, Float16>(from, to, size);
            case BFloat16: return convert_values<kFrom, BFloat16>(from, to, size);
            case Float32: return convert_values<kFrom, Float32>(from, to, size);
        }
    };
    switch (stored) {
        case Float16: return run.operator()<Float16>();
        case BFloat16: return run.operator()<BFloat16>();
        case Float32: return run.operator()<Float32>();
    }
}

}  // namespace cachegen
