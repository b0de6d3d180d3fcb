#include "mean_rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "rows_convert.h"

namespace cachegen {
namespace {

// The few values of a unit by lane, and what becomes of them.
template <KVType kType>
class FewElements {
public:
    FewElements(const UnitJob& job, std::span<const FewValue> few, const float* angles)
        : job_(job), few_(few), angles_(angles), pairs_(job.cos ? job.half : 0) {
        for (const FewValue& one : few) {
            const uint32_t lane = uint32_t{1} << one.lane;
            twice_ |= lanes_ & lane;
            lanes_ |= lane;
        }
    }

    uint32_t lanes() const { return lanes_; }

    // rows: of elements, one for each lane; null: nowhere.
    void put(std::byte* const* rows) const {
        for (const FewValue& one : few_) {
            std::byte* const row = rows[one.lane];
            if (!row) continue;
            const float value = scale_value(job_, one.row, one.value);
            if (one.row >= 2 * pairs_) {
                put_one(row, one.row, value);
                continue;
            }
            const bool is_second = job_.interleaved ? one.row % 2 : one.row >= pairs_;
            const size_t apart = job_.interleaved ? 1 : pairs_;
            const size_t first = one.row - (is_second ? apart : 0), second = first + apart;
            const float other = value_of(is_second ? first : second, one.lane);
            const float a = is_second ? other : value, b = is_second ? value : other;
            const size_t pair = job_.interleaved ? first / 2 : first;
            const float* const own = angles_ + 2 * pairs_ * one.lane;
            const float cos = own[pair], sin = own[pairs_ + pair];
            put_one(row, first, a * cos - b * sin);
            put_one(row, second, b * cos + a * sin);
        }
    }

private:
    float value_of(size_t row, unsigned lane) const {
        if (twice_ >> lane & 1)
            for (const FewValue& one : few_)
                if (one.row == row && one.lane == lane) return scale_value(job_, row, one.value);
        return job_.mean[row];
    }

    static void put_one(std::byte* row, size_t index, float value) {
        using Bits = typename KVTraits<kType>::Bits;
        if constexpr (kType == KVType::Float16) value = std::clamp(value, -65504.0f, 65504.0f);
        const Bits bits = KVTraits<kType>::from_float(value);
        std::memcpy(row + index * sizeof bits, &bits, sizeof bits);
    }

    const UnitJob& job_;
    std::span<const FewValue> few_;
    const float* angles_;
    size_t pairs_;
    uint32_t lanes_ = 0, twice_ = 0;  // with a value, and with more than one
};

template <KVType kType>
void finish(const Kernels& kernel, const UnitJob& job, std::span<const FewValue> few,
            const float* angles) {
    constexpr size_t kElement = sizeof(typename KVTraits<kType>::Bits);
    const size_t size = job.size * kElement, stride = (size + 63) / 64 * 64;
    const FewElements<kType> elements(job, few, angles);
    // Rows that values are put into are made apart.
    std::array<std::byte*, kLanes> rows;
    uint32_t wanted = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        rows[lane] = job.rows[lane];
        wanted |= static_cast<uint32_t>(rows[lane] != nullptr) << lane;
    }
    const uint32_t apart = wanted & elements.lanes();
    for (uint32_t lanes = apart; lanes; lanes &= lanes - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
        rows[lane] = static_cast<std::byte*>(job.scratch) + lane * stride;
    }
    if (job.cos) {
        kernel.turn_means[static_cast<size_t>(kType)]({job.mean, job.size, angles, job.half,
                                                       job.interleaved, wanted, rows.data(),
                                                       apart});
    } else {
        // All alike: made where the first lane has its own, or would have.
        const auto first = static_cast<unsigned>(std::countr_zero(apart)) % kLanes;
        std::byte* const means = static_cast<std::byte*>(job.scratch) + first * stride;
        convert_row(KVType::Float32, reinterpret_cast<const std::byte*>(job.mean), kType, means,
                    job.size);
        for (uint32_t lanes = wanted & ~apart; lanes; lanes &= lanes - 1)
            kernel.symbol_rows.stream(means, size, job.rows[std::countr_zero(lanes)]);
        for (uint32_t lanes = apart & (apart - 1); lanes; lanes &= lanes - 1)
            std::memcpy(rows[static_cast<unsigned>(std::countr_zero(lanes))], means, size);
    }
    elements.put(rows.data());
    for (uint32_t lanes = apart; lanes; lanes &= lanes - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(lanes));
        kernel.symbol_rows.stream(rows[lane], size, job.rows[lane]);
    }
}

}  // namespace

void finish_means(const Kernels& kernel, KVType type, const UnitJob& job,
                  std::span<const FewValue> few, const float* angles) {
    switch (type) {
        case KVType::Float16: return finish<KVType::Float16>(kernel, job, few, angles);
        case KVType::BFloat16: return finish<KVType::BFloat16>(kernel, job, few, angles);
        case KVType::Float32: return finish<KVType::Float32>(kernel, job, few, angles);
    }
}

}  // namespace cachegen
