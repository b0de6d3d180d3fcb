// Tiles and code lengths of the `progressive` encoder for AVX-512.
#include "encode_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace cachegen {
namespace {

// 32 rows of 32 elements of 16 bits, rows and columns exchanged: interleaving row i with row i + 4
// rotates the address of an element (docs/entropy-coding.md, "From steps to rows"), three times for
// 8 x 8 elements in each quarter of 8 registers; then the quarters of four registers are exchanged.
[[gnu::always_inline]] inline void transpose(__m512i (&rows)[32]) {
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
        __m512i* const of = rows + 8 * group;
#pragma GCC unroll 3
        for (int round = 0; round < 3; ++round) {
            __m512i next[8];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                next[2 * i] = _mm512_unpacklo_epi16(of[i], of[i + 4]);
                next[2 * i + 1] = _mm512_unpackhi_epi16(of[i], of[i + 4]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) of[i] = next[i];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512i low01 = _mm512_shuffle_i32x4(rows[i], rows[8 + i], 0x44);
        const __m512i low23 = _mm512_shuffle_i32x4(rows[16 + i], rows[24 + i], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(rows[i], rows[8 + i], 0xee);
        const __m512i high23 = _mm512_shuffle_i32x4(rows[16 + i], rows[24 + i], 0xee);
        rows[i] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        rows[16 + i] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        rows[24 + i] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

template <KVType kType>
inline __m512 to_floats(__m256i bits) {
    if constexpr (kType == KVType::BFloat16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    return _mm512_cvtph_ps(bits);
}

}  // namespace

template <KVType kType>
void read_tile_avx512(const std::byte* const* memory, size_t count, float* rows) {
    for (size_t begin = 0; begin < count; begin += 32, rows += 32 * kLanes) {
        const size_t present = std::min<size_t>(32, count - begin);
        const __mmask32 kept = ~uint32_t{0} >> (32 - present);
        __m512i tile[32];
#pragma GCC unroll 32
        for (size_t e = 0; e < kLanes; ++e)
            tile[e] = _mm512_maskz_loadu_epi16(kept, memory[e] + 2 * begin);
        transpose(tile);
#pragma GCC unroll 32
        for (size_t i = 0; i < 32; ++i) {
            if (i >= present) break;
            _mm512_store_ps(rows + i * kLanes, to_floats<kType>(_mm512_castsi512_si256(tile[i])));
            _mm512_store_ps(rows + i * kLanes + 16,
                            to_floats<kType>(_mm512_extracti64x4_epi64(tile[i], 1)));
        }
    }
}

template void read_tile_avx512<KVType::Float16>(const std::byte* const*, size_t, float*);
template void read_tile_avx512<KVType::BFloat16>(const std::byte* const*, size_t, float*);

unsigned code_lengths_avx512(const uint16_t* counts, const int16_t* costs, size_t size,
                             uint32_t* lengths) {
    constexpr size_t kRegisters = kWays / 16;
    __m512i sums[kRegisters];
#pragma GCC unroll 12
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    for (size_t pair = 0; pair < size / 2; ++pair, costs += 2 * kWays) {
        uint32_t both;
        std::memcpy(&both, counts + 2 * pair, sizeof both);
        if (!both) continue;
        const __m512i times = _mm512_set1_epi32(static_cast<int>(both));
#pragma GCC unroll 12
        for (size_t i = 0; i < kRegisters; ++i)
            sums[i] = _mm512_dpwssd_epi32(sums[i], times, _mm512_loadu_si512(costs + 32 * i));
    }
#pragma GCC unroll 12
    for (size_t i = 0; i < kRegisters; ++i) _mm512_storeu_si512(lengths + 16 * i, sums[i]);
    __m512i least = sums[0];
#pragma GCC unroll 11
    for (size_t i = 1; i < kRegisters; ++i) least = _mm512_min_epu32(least, sums[i]);
    least = _mm512_set1_epi32(static_cast<int>(_mm512_reduce_min_epu32(least)));
    size_t first = 0;
    while (!_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(lengths + first), least)) first += 16;
    const __mmask16 found = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(lengths + first), least);
    return static_cast<unsigned>(first) + static_cast<unsigned>(std::countr_zero(found));
}

}  // namespace cachegen
