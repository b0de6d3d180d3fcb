// Decoding of the `progressive` codec with a profile: entropy decoding, the product of components
// and basis, planes. docs/fused-decode.md, "With a profile".
#pragma once

#include <vector>

#include "fused_decode.h"
#include "packed_basis.h"

namespace cachegen {

// What a group with a profile has beside its bytes. `decoded` has no planes here.
struct TransformGroup {
    FusedGroup decoded;
    std::vector<PlaneTarget> planes;  // in channel order
    const PackedBasis* basis;
    const float* mean;        // of the channels
    std::vector<float> factors;  // of each plane: V is divided by its weight
};

struct TransformDecode {
    const FusedDecode& work;  // without groups
    std::vector<TransformGroup> groups;
};

// Throws Error: Truncated or Corrupt for bytes, Geometry for sizes that contradict one another,
// Config if there is no product kernel (`product_kernel`).
void decode_transformed(const TransformDecode& decode);

}  // namespace cachegen
