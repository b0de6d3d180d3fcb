// The product in tiles of bfloat16 (AMX). A float is a high and a low bfloat16; the products of
// high by high, high by low and low by high are summed in float32, which leaves 16 bits of each
// factor.
#include "product_rows_avx512.h"

namespace cachegen {
namespace {

constexpr size_t kTile = 1024;  // 16 rows of 64 bytes

// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// A constant in memory, as compilers believe that the instruction reads a pointer's size only.
constinit const TileConfig kTiles;

void begin() { _tile_loadconfig(&kTiles); }

void end() { _tile_release(); }

// 32 values as high and low parts, in lane order.
struct Parts {
    __m512i high, low;
};

inline __m512i to_bfloat16(__m512 first, __m512 second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

inline Parts split(__m512 first, __m512 second) {
    const __m512i high = to_bfloat16(first, second);
    const auto left = [](__m512 value, __m256i part) {
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
        return _mm512_sub_ps(value, _mm512_castsi512_ps(wide));
    };
    return {high, to_bfloat16(left(first, _mm512_castsi512_si256(high)),
                              left(second, _mm512_extracti64x4_epi64(high, 1)))};
}

void fill_tables(const SlotScale* scales, size_t count, int late_below, SlotTable* tables) {
    for (size_t slot = 0; slot < count; ++slot) {
        const Parts parts = split(scale(table_values(false), scales[slot], late_below),
                                  scale(table_values(true), scales[slot], late_below));
        _mm512_store_si512(tables[slot].bytes, parts.high);
        _mm512_store_si512(tables[slot].bytes + 64, parts.low);
    }
}

inline Parts parts_of(const ExpandJob& job, size_t slot) {
    const __m512i values = values_of(job, slot);
    if (is_narrow(values)) [[likely]] {
        const std::byte* const table = job.tables[slot].bytes;
        return {_mm512_permutexvar_epi16(values, _mm512_load_si512(table)),
                _mm512_permutexvar_epi16(values, _mm512_load_si512(table + 64))};
    }
    const auto part = [&](__m256i half) {
        return scale(_mm512_cvtepi16_epi32(half), job.scales[slot], job.late_below);
    };
    return split(part(_mm512_castsi512_si256(values)),
                 part(_mm512_extracti64x4_epi64(values, 1)));
}

// Four tiles: high parts of the even lanes, of the odd ones, low parts of both. A row of a tile has
// two slots, side by side for every lane.
bool expand(const ExpandJob& job) {
    if (is_zero(job)) return false;
    for (size_t row = 0; row < kSlotBlock / 2; ++row) {
        const Parts first = parts_of(job, 2 * row), second = parts_of(job, 2 * row + 1);
        std::byte* const out = job.out + row * 64;
        const auto put = [](std::byte* to, __m512i a, __m512i b) {
            constexpr __mmask32 kUpper = 0xaaaaaaaa;
            _mm512_store_si512(to, _mm512_mask_blend_epi16(kUpper, a, _mm512_slli_epi32(b, 16)));
            _mm512_store_si512(to + kTile,
                               _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(a, 16), b));
        };
        put(out, first.high, second.high);
        put(out + 2 * kTile, first.low, second.low);
    }
    return true;
}

// A cell of a basis: tiles of the high parts of 16 channels and of 16 more, then of the low ones.
// Tiles 0 to 3 are sums, 4 and 5 of the basis, 6 and 7 components of even and odd lanes.
template <bool kLow>
void multiply_block(const MultiplyJob& job, size_t block) {
    const size_t row = block * job.slot_blocks * job.cell_bytes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t n = 0; n < job.count; ++n) {
        const size_t active = job.active[n];
        const std::byte* const cell = job.basis + row + active * job.cell_bytes;
        const std::byte* const parts = job.components + active * kExpandedBytes;
        // Tiles are loaded row by row: what comes from the second-level cache is asked for before.
        const std::byte* const following =
            n + 1 < job.count ? job.basis + row + job.active[n + 1] * job.cell_bytes
                              : cell + job.slot_blocks * job.cell_bytes;
        for (size_t i = 0; i < (kLow ? 4 : 2) * kTile; i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(following + i), _MM_HINT_T0);
        _tile_loadd(6, parts, 64);
        _tile_loadd(7, parts + kTile, 64);
        if constexpr (kLow) {
            _tile_loadd(4, cell + 2 * kTile, 64);
            _tile_loadd(5, cell + 3 * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(4, cell, 64);
        _tile_loadd(5, cell + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, parts + 2 * kTile, 64);
        _tile_loadd(7, parts + 3 * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (!job.next) continue;
        const std::byte* const ahead = job.next + row + active * job.cell_bytes;
        const size_t lines = job.cell_bytes / 64;
        for (size_t i = lines * job.share / job.shares; i < lines * (job.share + 1) / job.shares;
             ++i)
            _mm_prefetch(reinterpret_cast<const char*>(ahead + i * 64), _MM_HINT_T1);
    }
    float* const out = job.out + block * kChannelBlock * kLanes;
    constexpr size_t kRow = kLanes * sizeof(float);
    _tile_stored(0, out, kRow);
    _tile_stored(1, out + 16, kRow);
    _tile_stored(2, out + 16 * kLanes, kRow);
    _tile_stored(3, out + 16 * kLanes + 16, kRow);
}

void multiply(const MultiplyJob& job) {
    for (size_t block = 0; block < job.channel_blocks; ++block)
        job.has_low ? multiply_block<true>(job, block) : multiply_block<false>(job, block);
}

}  // namespace

constinit const ProductKernel kProductTiles = {
    .form = BasisForm::Tiles,
    .begin = begin,
    .end = end,
    .fill_tables = fill_tables,
    .expand = expand,
    .multiply = multiply,
    .finish = {finish_floats<KVType::Float16>, finish_floats<KVType::BFloat16>,
               finish_floats<KVType::Float32>},
};

}  // namespace cachegen
