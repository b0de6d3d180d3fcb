// What the files encode_*_avx512.cpp and encode_avx512.cpp add to the AVX-512 kernels.
#pragma once

#include "encode_kernels.h"

namespace cachegen {

void encode_steps_avx512(const StepsJob* jobs, size_t count);
template <unsigned R>
void quantize_rows_avx512(const QuantizeJob& job);
void count_channel_avx512(const uint16_t* codes, const uint8_t* symbols, const uint8_t* tally,
                          size_t places, size_t stride, unsigned refinements, uint32_t* counts);
unsigned code_lengths_avx512(const uint16_t* counts, const int16_t* costs, size_t size,
                             uint32_t* lengths);
template <KVType kType>
void read_tile_avx512(const std::byte* const* memory, size_t count, float* rows);

constexpr LadderEncodeRows with_avx512(LadderEncodeRows rows) {
    rows.encode_steps = encode_steps_avx512;
    rows.quantize_rows[1] = quantize_rows_avx512<1>;
    rows.quantize_rows[2] = quantize_rows_avx512<2>;
    rows.quantize_rows[3] = quantize_rows_avx512<3>;
    rows.tallies[1] = rows.tallies[2] = rows.tallies[3] = true;
    rows.count_channel = count_channel_avx512;
    rows.code_lengths = code_lengths_avx512;
    rows.read_tile[static_cast<size_t>(KVType::Float16)] = read_tile_avx512<KVType::Float16>;
    rows.read_tile[static_cast<size_t>(KVType::BFloat16)] = read_tile_avx512<KVType::BFloat16>;
    return rows;
}

}  // namespace cachegen
