// What encode_avx2.cpp adds to the AVX2 kernels.
#pragma once

#include "encode_kernels.h"

namespace cachegen {

void encode_steps_avx2(const StepsJob* jobs, size_t count);
void count_channel_avx2(const uint16_t* codes, const uint8_t* symbols, const uint8_t* tally,
                        size_t places, size_t stride, unsigned refinements, uint32_t* counts);
void read_tile_avx2(const std::byte* const* memory, size_t count, float* rows);  // bfloat16
unsigned code_lengths_avx2(const uint16_t* counts, const int16_t* costs, size_t size,
                           uint32_t* lengths);

constexpr LadderEncodeRows with_avx2(LadderEncodeRows rows) {
    rows.encode_steps = encode_steps_avx2;
    rows.read_tile[static_cast<size_t>(KVType::BFloat16)] = read_tile_avx2;
    rows.count_channel = count_channel_avx2;
    rows.code_lengths = code_lengths_avx2;
    return rows;
}

}  // namespace cachegen
