#include "channel_models.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"

namespace cachegen {
namespace {

constexpr size_t kValues = 32;
constexpr int kCentre = 16;  // of the frozen tables
constexpr size_t kMostClasses = 128;
constexpr int kRotationSteps[kRotations] = {0, -1, 1};  // from the one that centres the mean

// One unit at a time to or from where it saves most or costs least; few rounds, as a floor is less
// than one unit too low for each value, and what is raised to 1 at most one too high.
void balance(const uint32_t* counts, size_t alphabet, std::span<const double> bits_saved,
             uint16_t* freqs) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    while (true) {
        int sum = 0;
        for (size_t a = 0; a < alphabet; ++a) sum += freqs[a];
        const int missing = static_cast<int>(kTotal) - sum;
        if (missing == 0) return;
        size_t best = 0;
        double best_bits = missing > 0 ? -infinity : infinity;
        for (size_t a = 0; a < alphabet; ++a) {
            const auto count = static_cast<double>(counts[a]);
            const unsigned freq = std::max<unsigned>(freqs[a], 1);
            if (missing > 0) {
                const double gain = counts[a] ? count * bits_saved[freq] : -infinity;
                if (gain > best_bits) best = a, best_bits = gain;
            } else {
                const double loss = freqs[a] > 1 ? count * bits_saved[freq - 1] : infinity;
                if (loss < best_bits) best = a, best_bits = loss;
            }
        }
        freqs[best] = static_cast<uint16_t>(freqs[best] + (missing > 0 ? 1 : -1));
    }
}

}  // namespace

void count_symbols(const SymbolMatrix& matrix, unsigned shift, size_t alphabet, uint32_t* counts) {
    std::fill_n(counts, matrix.channels * alphabet, 0u);
    const SymbolRows& rows = kernels().symbol_rows;
    for (size_t c = 0; c < matrix.channels; c += kCountedChannels) {
        const size_t some = std::min(kCountedChannels, matrix.channels - c);
        for (size_t t = 0; t < matrix.tokens; t += kCountedTokens)
            rows.count(matrix.symbols + t * matrix.channels + c, matrix.channels,
                       std::min(kCountedTokens, matrix.tokens - t), some, shift, alphabet,
                       counts + c * alphabet);
    }
}

void normalize_counts(std::span<const uint32_t> counts, size_t alphabet,
                      std::span<const double> bits_saved, uint16_t* freqs) {
    // Channels of a matrix have the same total, and few counts in all.
    constexpr uint64_t kMostKnown = 4096;
    std::vector<uint16_t> known;  // by count, for this total
    uint64_t known_total = 0;
    for (size_t begin = 0; begin < counts.size(); begin += alphabet, freqs += alphabet) {
        const uint32_t* const row = &counts[begin];
        uint64_t total = 0;
        for (size_t a = 0; a < alphabet; ++a) total += row[a];
        if (total == 0) {
            std::fill_n(freqs, alphabet, uint16_t{0});
            freqs[0] = kTotal;
            continue;
        }
        const double scale = kTotal / static_cast<double>(total);
        const auto freq_of = [&](uint32_t count) {
            return count ? static_cast<uint16_t>(std::max(count * scale, 1.0)) : uint16_t{0};
        };
        if (total <= kMostKnown) {
            if (total != known_total) {
                known.resize(total + 1);
                for (uint32_t count = 0; count <= total; ++count) known[count] = freq_of(count);
                known_total = total;
            }
            for (size_t a = 0; a < alphabet; ++a) freqs[a] = known[row[a]];
        } else {
            for (size_t a = 0; a < alphabet; ++a) freqs[a] = freq_of(row[a]);
        }
        balance(row, alphabet, bits_saved, freqs);
    }
}

void fit_classes(std::span<const uint32_t> counts, std::span<const int16_t> costs, size_t classes,
                 uint8_t* chosen, uint8_t* rotations) {
    // Sums of so many counts times costs fit 32 bits, and counts the 16 bits of the kernel.
    constexpr uint32_t kMostTokens = 32767;
    const SymbolRows& rows = kernels().symbol_rows;
    for (size_t begin = 0; begin < counts.size(); begin += kValues, ++chosen, ++rotations) {
        const uint32_t* const row = &counts[begin];
        uint64_t total = 0, sum = 0;
        for (uint32_t v = 0; v < kValues; ++v) total += row[v], sum += uint64_t{v} * row[v];
        const double mean = static_cast<double>(sum) / static_cast<double>(std::max<uint64_t>(total, 1));
        // The sum has no bits behind the point, so the addition is rint (ties to even).
        constexpr double kRounder = 0x1.8p52;
        const int middle = static_cast<int>(mean + kRounder - kRounder);
        size_t tried[kRotations];
        for (size_t r = 0; r < kRotations; ++r)
            tried[r] = static_cast<size_t>(middle + kRotationSteps[r] - kCentre) % kValues;
        size_t best = 0;
        if (total <= kMostTokens) {
            uint16_t twice[2 * kValues];
            for (size_t v = 0; v < kValues; ++v)
                twice[v] = twice[v + kValues] = static_cast<uint16_t>(row[v]);
            const uint16_t* rotated[kRotations];
            for (size_t r = 0; r < kRotations; ++r) rotated[r] = twice + tried[r];
            uint32_t bits[kRotations * kMostClasses];
            best = rows.best_class(rotated, costs.data(), classes, bits);
        } else {
            uint64_t bits[kRotations * kMostClasses] = {};
            for (size_t r = 0; r < kRotations; ++r)
                for (size_t v = 0; v < kValues; ++v)
                    for (size_t c = 0; c < classes; ++c)
                        bits[r * classes + c] +=
                            row[(v + tried[r]) % kValues] *
                            static_cast<uint64_t>(costs[2 * (v / 2 * classes + c) + v % 2]);
            best = static_cast<size_t>(
                std::min_element(bits, bits + kRotations * classes) - bits);
        }
        *chosen = static_cast<uint8_t>(best % classes);
        *rotations = static_cast<uint8_t>(tried[best / classes]);
    }
}

}  // namespace cachegen
