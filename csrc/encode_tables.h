// The ladder's frozen tables as the encoder of `progressive` needs them, made once per process.
#pragma once

#include <cstdint>
#include <vector>

#include "alias_table.h"
#include "encode_kernels.h"

namespace cachegen {

class EncodeTables {
public:
    // coarse: K = 32, all with an escape index. refine: pairs of models with 3 symbols.
    EncodeTables(const Tables& coarse, const Tables& refine);

    size_t rows() const { return coarse_.size(); }
    const CoarseEncodeTable* coarse() const { return coarse_.data(); }
    const RefineEncodeTable* refine() const { return refine_.data(); }
    uint8_t escape(size_t row) const { return escapes_[row]; }
    uint8_t rounds(size_t row) const { return rounds_[row]; }  // see StepsJob

private:
    std::vector<CoarseEncodeTable> coarse_;
    std::vector<RefineEncodeTable> refine_;
    std::vector<uint8_t> escapes_, rounds_;
};

}  // namespace cachegen
