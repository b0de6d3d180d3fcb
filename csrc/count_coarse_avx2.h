// Counts of the magnitudes of pass 0, for every backend with AVX2.
#pragma once

#include <immintrin.h>

#include <bit>

#include "encode_kernels.h"

namespace cachegen {
namespace {  // one copy per backend, never merged by the linker

// counts: magnitudes 0 to 15, 16 and more, of one channel; all zero before.
[[maybe_unused]] inline void count_coarse(const uint8_t* symbols, size_t places, size_t stride,
                                          uint32_t* counts) {
    const auto row = [&](size_t place) {
        // (symbol + 1) / 2
        return _mm256_avg_epu8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                                   symbols + place * stride)),
                               _mm256_setzero_si256());
    };
    uint32_t left = static_cast<uint32_t>(places * kLanes);
    for (unsigned magnitude = 0; magnitude < 16 && left; ++magnitude) {
        const __m256i wanted = _mm256_set1_epi8(static_cast<char>(magnitude));
        uint32_t found = 0;
        for (size_t place = 0; place < places; ++place)
            found += static_cast<uint32_t>(std::popcount(static_cast<uint32_t>(
                _mm256_movemask_epi8(_mm256_cmpeq_epi8(row(place), wanted)))));
        counts[magnitude] = found;
        left -= found;
    }
    counts[16] = left;
}

}  // namespace
}  // namespace cachegen
