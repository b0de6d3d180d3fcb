// Memory for the bodies of segments between their coding and the object. Fresh memory has its pages
// cleared by the kernel, which takes longer than to write them; so some is kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace cachegen {

class BodyStore {
public:
    static constexpr size_t kBlockBytes = size_t{1} << 20;
    // Blocks that the process keeps when no store has them.
    static constexpr size_t kMostKept = 16;

    BodyStore() = default;
    BodyStore(BodyStore&&) = default;
    ~BodyStore();

    // Room for so many bytes, anything in it, until the store goes.
    std::span<uint8_t> take(size_t bytes);
    std::span<const uint8_t> copy(std::span<const uint8_t> bytes);

private:
    using Block = std::unique_ptr<uint8_t[]>;

    std::vector<Block> blocks_;  // of kBlockBytes; the last one is in use
    std::vector<Block> large_;   // of what no block holds
    size_t used_ = kBlockBytes;  // of the last block
};

}  // namespace cachegen
