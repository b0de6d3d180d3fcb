// What alias_avx512.cpp adds to the AVX-512 kernels.
#pragma once

#include "alias_table.h"

namespace cachegen {

void build_alias_avx512(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                        AliasTable* tables);
void build_inverse_avx512(const uint16_t* freqs, size_t alphabet, size_t count, unsigned buckets,
                          const float* reciprocals, InverseTable* tables);

}  // namespace cachegen
