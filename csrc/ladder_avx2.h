// The loops of the `progressive` decoder that compilers do not vectorise by themselves, for every
// backend with AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "dispatch.h"
#include "ladder_rows.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker: each has other compiler flags

void find_bytes_avx2(const uint8_t* block, const uint8_t* wanted, size_t steps, uint32_t* found) {
    for (size_t step = 0; step < steps; ++step) {
        const __m256i row =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(block + step * kLanes));
        const __m256i same =
            _mm256_cmpeq_epi8(row, _mm256_set1_epi8(static_cast<char>(wanted[step])));
        found[step] = static_cast<uint32_t>(_mm256_movemask_epi8(same));
    }
}

void find_values_avx2(const int16_t* values, size_t rows, uint32_t* found) {
    const __m256i zero = _mm256_setzero_si256();
    for (size_t row = 0; row < rows; ++row, values += kLanes) {
        const auto* const at = reinterpret_cast<const __m256i*>(values);
        const __m256i none = _mm256_packs_epi16(
            _mm256_cmpeq_epi16(_mm256_load_si256(at), zero),
            _mm256_cmpeq_epi16(_mm256_load_si256(at + 1), zero));
        // Packing works on halves: quarters 1 and 2 change places.
        found[row] = ~static_cast<uint32_t>(
            _mm256_movemask_epi8(_mm256_permute4x64_epi64(none, 0xd8)));
    }
}

// Transposes 8 x 8 elements of 16 bits in each half of 8 registers: interleaving row i with row
// i + 4 moves the top bit of the row number to the lowest bit of the column number, as in
// block_avx2.h.
[[gnu::always_inline]] inline void transpose_8x8(__m256i (&rows)[8]) {
#pragma GCC unroll 3
    for (int round = 0; round < 3; ++round) {
        __m256i next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = _mm256_unpacklo_epi16(rows[i], rows[i + 4]);
            next[2 * i + 1] = _mm256_unpackhi_epi16(rows[i], rows[i + 4]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) rows[i] = next[i];
    }
}

// Two whole cache lines, past the caches: nothing of what was there is needed.
inline void stream_two_lines(std::byte* to, const void* from) {
    for (size_t i = 0; i < 4; ++i)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i,
                            _mm256_load_si256(static_cast<const __m256i*>(from) + i));
}

// 64 rows of 32 lanes at a time, so that every lane gets two whole cache lines at once: memory takes
// neighbours faster, and rows of the destination are often a power of two apart and would evict one
// another's half-written lines.
inline void store_rows_16bit(const void* scratch, size_t size, std::byte* const* rows) {
    constexpr size_t kTile = 64;
    const auto* from = static_cast<const uint16_t*>(scratch);
    alignas(64) uint16_t turned[kLanes][kTile];
    for (size_t begin = 0; begin < size; begin += kTile) {
        const size_t count = std::min(kTile, size - begin);
        // What is behind `size` is read from the scratch memory, which has room for it, and dropped.
        for (size_t step = 0; step < count; step += 8) {
            for (unsigned half = 0; half < kLanes; half += 16) {
                __m256i tile[8];
                for (size_t i = 0; i < 8; ++i)
                    tile[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(
                        from + (begin + step + i) * kLanes + half));
                transpose_8x8(tile);
                for (unsigned i = 0; i < 8; ++i) {
                    _mm_store_si128(reinterpret_cast<__m128i*>(&turned[half + i][step]),
                                    _mm256_castsi256_si128(tile[i]));
                    _mm_store_si128(reinterpret_cast<__m128i*>(&turned[half + 8 + i][step]),
                                    _mm256_extracti128_si256(tile[i], 1));
                }
            }
        }
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            if (!rows[lane]) continue;
            std::byte* const to = rows[lane] + begin * sizeof(uint16_t);
            if (count == kTile && reinterpret_cast<uintptr_t>(to) % 64 == 0)
                stream_two_lines(to, turned[lane]);
            else
                std::memcpy(to, turned[lane], count * sizeof(uint16_t));
        }
    }
}

template <KVType kType>
void finish_unit_avx2(const UnitJob& job) {
    convert_unit<kType>(job);
    if constexpr (kType == KVType::Float32)
        store_rows<uint32_t>(job.scratch, job.size, job.rows);
    else
        store_rows_16bit(job.scratch, job.size, job.rows);
}

}  // namespace
}  // namespace cachegen
