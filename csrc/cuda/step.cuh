// progressive's encoder: the step of a chunk, from the energy of its values or components.
#pragma once

#include "statistics.cuh"

namespace cachegen {

// Sums the squares of components of ordinary tokens.
CACHEGEN_KERNEL(sum_squares)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    Columns tile;
    if (!tile_of(launch, tile)) return;
    const Source& source = source_of(launch, tile.owner);
    if (!source.deviations) return;
    const uint32_t channel = tile.first + lane_index();
    const uint8_t* const marks = at_address<const uint8_t>(source.marks);
    double total = 0;
    if (channel < source.channels)
        for (uint32_t t = 0; t < source.tokens; ++t)
            if (!marks[t]) {
                const double value = *values_at(source, t, channel);
                total = sum(total, product(value, value));
            }
    total = warp_sum(total);
    if (lane_index() == 0) partials_of(source, tile)[0] = total;
}

// Sums one of the partials of a group's tiles; all lanes of the warp get it.
CACHEGEN_DEVICE double sum_partials(const Source& source, unsigned which) {
    double total = 0;
    const double* const all = at_address<const double>(source.partials) + which;
    for (uint32_t tile = lane_index(); tile < source.tiles; tile += kLanes)
        total = sum(total, all[uint64_t{tile} * kPartials]);
    return warp_sum(total);
}

// The step of every chunk, relative to the spread of its coefficients. A warp each; launch.items:
// what the host says of the chunks.
CACHEGEN_KERNEL(choose_step)(uint64_t address) {
    const Launch& launch = *at_address<const Launch>(address);
    const unsigned warp = warp_of_launch();
    if (warp >= launch.count) return;
    const ChunkState& chunk = at_address<const ChunkState>(launch.items)[warp];
    double energy = 0;
    for (uint32_t g = 0; g < chunk.groups; ++g) {
        const Source& source = source_of(launch, chunk.first_group + g);
        energy = sum(energy, source.deviations ? sum_partials(source, 0) : result_of(source).energy);
    }
    if (lane_index() != 0) return;
    const double spread = root(quotient(energy, chunk.values));
    ChunkState& out = at_address<ChunkState>(launch.active)[warp];
    out.spread = spread;
    out.step = spread > 0 ? static_cast<float>(product(chunk.relative, spread)) : 1.0f;
}

}  // namespace cachegen
