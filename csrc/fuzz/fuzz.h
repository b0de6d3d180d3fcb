// What the parts of the fuzz driver share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "alias_table.h"
#include "format.h"

namespace cachegen {

// A heap block without slack, unlike a vector.
template <class T>
struct Exact {
    explicit Exact(size_t size) : size(size), data(new T[size]()) {}
    explicit Exact(const std::vector<T>& from) : Exact(from.size()) {
        std::copy(from.begin(), from.end(), data.get());
    }
    std::span<const T> view() const { return {data.get(), size}; }
    bool operator==(const Exact& other) const {
        return std::equal(data.get(), data.get() + size, other.data.get(),
                          other.data.get() + other.size);
    }

    size_t size;
    std::unique_ptr<T[]> data;
};

class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    uint64_t bits() { return engine_(); }
    uint64_t below(uint64_t n) { return engine_() % n; }
    bool one_in(uint64_t n) { return below(n) == 0; }

private:
    std::mt19937_64 engine_;  // the same on every platform, unlike the distributions
};

inline unsigned passed = 0, failed = 0;

inline void check(bool good, const char* what, uint64_t round) {
    good ? ++passed : ++failed;
    if (!good) std::printf("FAILED in round %llu: %s\n", (unsigned long long)round, what);
}

// 4096 slots thrown at `size` symbols, all but `used` of which stay at 0, in large or small lots.
inline void random_freqs(Random& random, uint16_t* freqs, size_t size) {
    const size_t used = 1 + random.below(size);
    const unsigned most = random.one_in(2) ? kTotal : 100;
    unsigned left = kTotal;
    while (left) {
        const auto part = static_cast<unsigned>(1 + random.below(std::min(left, most)));
        uint16_t& freq = freqs[random.below(used)];
        freq = static_cast<uint16_t>(freq + part);
        left -= part;
    }
}

// Random tables of the ladder's shape, and the row of a class (family * 64 + class) for the pass
// whose step is 3^below.
struct LadderTables {
    std::unique_ptr<Tables> coarse, refine;
};
const LadderTables& ladder_tables();
unsigned ladder_row(unsigned both, unsigned below);

// The fused decoder of `progressive`: see fused.cpp; and its encoder: see encode.cpp.
void fuzz_fused(Random& random, uint64_t round);
void fuzz_encode(Random& random, uint64_t round);

// Whole planes of `int8` and `cachegen`: see planes.cpp.
void fuzz_planes(Random& random, uint64_t round);

// Planes of `lossless`: see lossless.cpp.
void fuzz_lossless(Random& random, uint64_t round);

}  // namespace cachegen
