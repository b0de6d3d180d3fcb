#include "product.h"

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "dispatch.h"

#if CACHEGEN_X86_KERNELS && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cachegen {
namespace {

bool allowed_at_first() {
    const char* const setting = std::getenv("CACHEGEN_TILES");
    return !setting || std::string_view(setting) != "0";
}

std::atomic<bool>& tiles_allowed() {
    static std::atomic<bool> allowed = allowed_at_first();
    return allowed;
}

}  // namespace

bool allow_tiles(bool allowed) { return tiles_allowed().exchange(allowed); }

#if CACHEGEN_X86_KERNELS
bool has_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    static const bool found = [] {
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        const bool tiles = d >> 24 & 1, bfloat16_tiles = d >> 22 & 1;
        if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
        const bool bfloat16_vectors = a >> 5 & 1;
        // The registers are 8 KiB that the system keeps for a process only if asked.
        constexpr long kRequestPermission = 0x1023, kTileData = 18;
        return tiles && bfloat16_tiles && bfloat16_vectors &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return found;
#else
    return false;
#endif
}
#endif

const ProductKernel* product_kernel([[maybe_unused]] KVType type) {
#if CACHEGEN_X86_KERNELS
    if (&kernels() != &kAvx512Kernels) return nullptr;
    // Two bfloat16 hold 16 bits of a float: more than 16-bit targets need, less than float32 does.
    if (type != KVType::Float32 && tiles_allowed() && has_tiles()) return &kProductTiles;
    return &kProductAvx512;
#else
    return nullptr;
#endif
}

}  // namespace cachegen
