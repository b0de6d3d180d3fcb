// A symbol matrix that is nearly all 0, as the places of everything else: FORMAT.md, "Sparse segment
// body".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "format.h"

namespace cachegen {

struct SparseSymbol {
    uint64_t step;
    uint8_t lane, symbol;
};

// In order of step, then lane; symbols are 1 to `largest`. Throws Error (Corrupt).
std::vector<SparseSymbol> parse_sparse(std::span<const uint8_t> body, const Shape& shape,
                                       unsigned largest);

// symbols: as parse_sparse returns them.
std::vector<uint8_t> write_sparse(std::span<const SparseSymbol> symbols, const Shape& shape);

}  // namespace cachegen
