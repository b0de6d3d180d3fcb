#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "error.h"

namespace cachegen {
namespace {

// Null until the first use, so that loading the library reads no environment.
std::atomic<const Kernels*> active = nullptr;

const Kernels& find(std::string_view isa, const char* what) {
    std::string names;
    for (const Kernels* backend : backends()) {
        if (!backend->is_available()) continue;
        if (backend->isa == isa) return *backend;
        names += (names.empty() ? "" : ", ") + std::string(backend->isa);
    }
    throw Error(ErrorKind::Config, what, std::string(isa), "one of " + names,
                "unset CACHEGEN_ISA to let the library choose");
}

const Kernels& choose() {
    if (const char* forced = std::getenv("CACHEGEN_ISA"); forced && *forced)
        return find(forced, "CACHEGEN_ISA");
    const Kernels* best = &kScalarKernels;
    for (const Kernels* backend : backends())
        if (backend->is_available()) best = backend;
    return *best;
}

}  // namespace

const std::vector<const Kernels*>& backends() {
    static const std::vector<const Kernels*> all = {
        &kScalarKernels,
#if CACHEGEN_X86_KERNELS
        &kAvx2Kernels,
        &kAvx512Kernels,
#endif
#if CACHEGEN_NEON_KERNELS
        &kNeonKernels,
#endif
    };
    return all;
}

#if CACHEGEN_X86_KERNELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}
#endif

const Kernels& kernels() {
    const Kernels* current = active.load(std::memory_order_relaxed);
    if (!current) {
        // Two threads may both get here; they choose the same.
        current = &choose();
        active.store(current, std::memory_order_relaxed);
    }
    return *current;
}

void select_isa(std::string_view isa) {
    active.store(&find(isa, "instruction set"), std::memory_order_relaxed);
}

}  // namespace cachegen
