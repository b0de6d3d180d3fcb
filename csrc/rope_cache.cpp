#include "rope_cache.h"

#include <cmath>

namespace cachegen {
namespace {

size_t floats_of_place(const RopeKind& kind) { return 4 * kind.frequencies.size() * kLanes; }

// cos and sin of one place in both orders.
void fill_rope(const RopeKind& kind, int64_t first_position, const Shape& shape, uint64_t place,
               const uint8_t* lanes, float* out) {
    const size_t half = kind.frequencies.size();
    float* const by_token = out + 2 * half * kLanes;
    for (size_t i = 0; i < half; ++i) {
        float *cos = out + i * kLanes, *sin = cos + half * kLanes;
        for (unsigned at = 0; at < kLanes; ++at) {
            const auto token = static_cast<int64_t>(lanes[at] * shape.places() + place);
            // Angles are float products, as models compute them; their cos and sin are exact.
            const float angle = static_cast<float>(first_position + token) * kind.frequencies[i];
            const double scale = kind.scale;
            cos[at] = static_cast<float>(std::cos(static_cast<double>(angle)) * scale);
            sin[at] = static_cast<float>(std::sin(static_cast<double>(angle)) * scale);
            float* const own = by_token + 2 * half * lanes[at];
            own[i] = cos[at];
            own[half + i] = sin[at];
        }
    }
}

}  // namespace

void RopeCache::prepare(const PlaneTarget& target, const Shape& shape) {
    if (target.rope < 0 || find(target, shape)) return;
    const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
    const size_t place = floats_of_place(kind);
    if (floats_ + place * shape.places() > kMostFloats) return;
    floats_ += place * shape.places();
    Entry entry{target.rope, target.first_position, shape.tokens, {}};
    entry.angles.resize(place * shape.places());
    for (uint64_t p = 0; p < shape.places(); ++p)
        fill_rope(kind, target.first_position, shape, p, lanes_, entry.angles.data() + place * p);
    entries_.push_back(std::move(entry));
}

const float* RopeCache::angles(const PlaneTarget& target, const Shape& shape, uint64_t place,
                               std::vector<float>& scratch) const {
    const RopeKind& kind = kinds_[static_cast<size_t>(target.rope)];
    const size_t size = floats_of_place(kind);
    if (const Entry* entry = find(target, shape)) return entry->angles.data() + size * place;
    scratch.resize(size);
    fill_rope(kind, target.first_position, shape, place, lanes_, scratch.data());
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
