#include "rope_cache.h"

#include <cmath>

namespace cachegen {
namespace {

// cos and sin of one place: a row of kLanes for each frequency.
void fill_rope(const RopeKind& kind, int64_t first_position, const Shape& shape, uint64_t place,
               const uint8_t* lanes, float* cos, float* sin) {
    for (const float frequency : kind.frequencies) {
        for (unsigned i = 0; i < kLanes; ++i, ++cos, ++sin) {
            const auto token = static_cast<int64_t>(lanes[i] * shape.places() + place);
            // Angles are float products, as models compute them; their cos and sin are exact.
            const float angle = static_cast<float>(first_position + token) * frequency;
            const double scale = kind.scale;
            *cos = static_cast<float>(std::cos(static_cast<double>(angle)) * scale);
            *sin = static_cast<float>(std::sin(static_cast<double>(angle)) * scale);
        }
    }
}

}  // namespace

void RopeCache::prepare(const PlaneTarget& target, const Shape& shape) {
    if (target.rope < 0 || find(target, shape)) return;
    const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
    const size_t place = kind.frequencies.size() * kLanes;
    if (floats_ + 2 * place * shape.places() > kMostFloats) return;
    floats_ += 2 * place * shape.places();
    Entry entry{target.rope, target.first_position, shape.tokens, {}};
    entry.angles.resize(2 * place * shape.places());
    for (uint64_t p = 0; p < shape.places(); ++p) {
        float* const cos = entry.angles.data() + 2 * place * p;
        fill_rope(kind, target.first_position, shape, p, lanes_, cos, cos + place);
    }
    entries_.push_back(std::move(entry));
}

const float* RopeCache::angles(const PlaneTarget& target, const Shape& shape, uint64_t place,
                               std::vector<float>& scratch) const {
    const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
    const size_t size = kind.frequencies.size() * kLanes;
    if (const Entry* entry = find(target, shape)) return entry->angles.data() + 2 * size * place;
    scratch.resize(2 * size);
    fill_rope(kind, target.first_position, shape, place, lanes_, scratch.data(),
              scratch.data() + size);
    return scratch.data();
}

const RopeCache::Entry* RopeCache::find(const PlaneTarget& target, const Shape& shape) const {
    for (const Entry& entry : entries_)
        if (entry.rope == target.rope && entry.first_position == target.first_position &&
            entry.tokens == shape.tokens)
            return &entry;
    return nullptr;
}

}  // namespace cachegen
