#include <cstring>
#include <string>

#include "error.h"
#include "fused_decode.h"

namespace cachegen {

uint32_t GroupSide::exempt_token(size_t index) const {
    uint32_t token;
    std::memcpy(&token, exempt.data() + 4 * index, sizeof token);
    return token;
}

GroupSide parse_side(std::span<const uint8_t> bytes, uint64_t tokens, uint64_t channels,
                     KVType stored, bool plain) {
    constexpr size_t kHead = 8;
    const auto refuse = [](const char* what, std::string got, std::string expected) {
        throw Error(ErrorKind::Corrupt, what, std::move(got), std::move(expected));
    };
    if (bytes.size() < kHead)
        refuse("side information", std::to_string(bytes.size()) + " bytes", "8 bytes or more");
    GroupSide side{};
    side.decay = bytes[0];
    side.class_offset = static_cast<int8_t>(bytes[1]);
    uint16_t count;
    std::memcpy(&count, &bytes[2], sizeof count);
    std::memcpy(&side.mean_scale, &bytes[4], sizeof side.mean_scale);
    const size_t width = stored == KVType::Float32 ? 4 : 2;
    const size_t classes = plain ? channels : 0;
    const size_t mean = plain && side.mean_scale != 0 ? channels : 0;
    const size_t size = kHead + classes + mean + count * (4 + channels * width);
    // The comparison is false for NaN.
    if (bytes.size() != size || !(side.mean_scale >= 0 && side.mean_scale < 0x1p100f))
        refuse("side information",
               std::to_string(bytes.size()) + " bytes, scale " + std::to_string(side.mean_scale),
               std::to_string(size) + " bytes");
    side.classes = bytes.subspan(kHead, classes);
    side.mean = bytes.subspan(kHead + classes, mean);
    side.exempt = bytes.subspan(kHead + classes + mean, size_t{4} * count);
    side.rows = bytes.subspan(kHead + classes + mean + size_t{4} * count);
    for (const uint8_t both : side.classes)
        if (both >= kFamilies * kClasses) refuse("class", std::to_string(both), "0 to 191");
    for (size_t i = 0; i < count; ++i) {
        const uint32_t token = side.exempt_token(i);
        if (token >= tokens || (i && token <= side.exempt_token(i - 1)))
            refuse("exempt tokens", std::to_string(token), "rising, in range");
    }
    return side;
}

}  // namespace cachegen
