#include "body_store.h"

#include <algorithm>
#include <mutex>

namespace cachegen {
namespace {

struct Kept {
    std::mutex mutex;
    std::vector<std::unique_ptr<uint8_t[]>> blocks;
};

Kept& kept() {
    static Kept all;
    return all;
}

}  // namespace

// Nobody waits for the lock: a process may fork while another thread holds it.
BodyStore::~BodyStore() {
    const std::unique_lock lock(kept().mutex, std::try_to_lock);
    if (!lock) return;
    for (Block& block : blocks_)
        if (kept().blocks.size() < kMostKept) kept().blocks.push_back(std::move(block));
}

std::span<uint8_t> BodyStore::take(size_t bytes) {
    if (!bytes) return {};
    if (bytes > kBlockBytes) {
        large_.push_back(std::make_unique_for_overwrite<uint8_t[]>(bytes));
        return {large_.back().get(), bytes};
    }
    if (bytes > kBlockBytes - used_) {
        Block block;
        if (const std::unique_lock lock(kept().mutex, std::try_to_lock);
            lock && !kept().blocks.empty()) {
            block = std::move(kept().blocks.back());
            kept().blocks.pop_back();
        }
        if (!block) block = std::make_unique_for_overwrite<uint8_t[]>(kBlockBytes);
        blocks_.push_back(std::move(block));
        used_ = 0;
    }
    uint8_t* const at = blocks_.back().get() + used_;
    used_ += bytes;
    return {at, bytes};
}

std::span<const uint8_t> BodyStore::copy(std::span<const uint8_t> bytes) {
    const std::span<uint8_t> to = take(bytes.size());
    std::copy(bytes.begin(), bytes.end(), to.begin());
    return to;
}

}  // namespace cachegen
