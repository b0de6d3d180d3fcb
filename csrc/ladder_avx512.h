// What ladder_avx512.cpp adds to the AVX-512 kernels of rans_avx512.cpp.
#pragma once

#include "dispatch.h"

namespace cachegen {

void decode_coarse_avx512(const CoarseTable* tables, DecodeRun* const* runs, size_t count,
                          size_t steps);
void decode_refine_avx512(const RefineTable* tables, int late_below, DecodeRun* const* runs,
                          size_t count, size_t steps);
template <KVType kType>
void finish_unit_avx512(const UnitJob& job);
// The second half of finish_unit alone: scratch to rows.
template <KVType kType>
void store_unit_avx512(const UnitJob& job);
extern const uint8_t kAngleLanesAvx512[kLanes];

}  // namespace cachegen
