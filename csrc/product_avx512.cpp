// The product in float32 for AVX-512: 8 channels by 32 tokens in registers.
#include "product_rows_avx512.h"

namespace cachegen {
namespace {

void fill_tables(const SlotScale* scales, size_t count, int late_below, SlotTable* tables) {
    for (size_t slot = 0; slot < count; ++slot) {
        auto* const out = reinterpret_cast<float*>(tables[slot].bytes);
        _mm512_store_ps(out, scale(table_values(false), scales[slot], late_below));
        _mm512_store_ps(out + 16, scale(table_values(true), scales[slot], late_below));
    }
}

// Rows of floats: even lanes, odd lanes.
bool expand(const ExpandJob& job) {
    if (is_zero(job)) return false;
    auto* const out = reinterpret_cast<float*>(job.out);
    for (size_t slot = 0; slot < kSlotBlock; ++slot) {
        const __m512i values = values_of(job, slot);
        Pair row;
        if (is_narrow(values)) [[likely]] {
            const auto* const entries = reinterpret_cast<const float*>(job.tables[slot].bytes);
            const __m512 low = _mm512_load_ps(entries), high = _mm512_load_ps(entries + 16);
            row.even = _mm512_permutex2var_ps(low, values, high);
            row.odd = _mm512_permutex2var_ps(low, _mm512_srli_epi32(values, 16), high);
        } else {
            row.even = scale(_mm512_srai_epi32(_mm512_slli_epi32(values, 16), 16),
                             job.scales[slot], job.late_below);
            row.odd = scale(_mm512_srai_epi32(values, 16), job.scales[slot], job.late_below);
        }
        _mm512_store_ps(out + slot * kLanes, row.even);
        _mm512_store_ps(out + slot * kLanes + 16, row.odd);
    }
    return true;
}

// A cell of a basis: for 4 times 8 channels, 8 floats for each of 32 slots.
constexpr size_t kPanel = 8;

void multiply(const MultiplyJob& job) {
    for (size_t block = 0; block < job.channel_blocks; ++block) {
        const std::byte* const cells = job.basis + block * job.slot_blocks * job.cell_bytes;
        for (size_t panel = 0; panel < kChannelBlock / kPanel; ++panel) {
            __m512 sums[kPanel][2];
#pragma GCC unroll 8
            for (size_t i = 0; i < kPanel; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
            for (size_t n = 0; n < job.count; ++n) {
                const size_t active = job.active[n];
                const float* weights =
                    reinterpret_cast<const float*>(cells + active * job.cell_bytes) +
                    panel * kPanel * kSlotBlock;
                const float* row =
                    reinterpret_cast<const float*>(job.components + active * kExpandedBytes);
                for (size_t slot = 0; slot < kSlotBlock;
                     ++slot, weights += kPanel, row += kLanes) {
                    const __m512 even = _mm512_load_ps(row), odd = _mm512_load_ps(row + 16);
#pragma GCC unroll 8
                    for (size_t i = 0; i < kPanel; ++i) {
                        const __m512 weight = _mm512_set1_ps(weights[i]);
                        sums[i][0] = _mm512_fmadd_ps(weight, even, sums[i][0]);
                        sums[i][1] = _mm512_fmadd_ps(weight, odd, sums[i][1]);
                    }
                }
            }
            float* const out = job.out + (block * kChannelBlock + panel * kPanel) * kLanes;
#pragma GCC unroll 8
            for (size_t i = 0; i < kPanel; ++i) {
                _mm512_store_ps(out + i * kLanes, sums[i][0]);
                _mm512_store_ps(out + i * kLanes + 16, sums[i][1]);
            }
        }
    }
}

}  // namespace

constinit const ProductKernel kProductAvx512 = {
    .form = BasisForm::Floats,
    .begin = [] {},
    .end = [] {},
    .fill_tables = fill_tables,
    .expand = expand,
    .multiply = multiply,
    .finish = {finish_floats<KVType::Float16>, finish_floats<KVType::BFloat16>,
               finish_floats<KVType::Float32>},
};

}  // namespace cachegen
