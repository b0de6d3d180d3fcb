// The entropy coder of all passes of `progressive` for AVX-512. All passes of a stream go side by
// side, so that their chains of dependent instructions overlap. docs/fused-encode.md derives it.
#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "divide_avx512.h"
#include "encode_avx512.h"
#include "rans_simd.h"

namespace cachegen {
namespace {

inline __m512i load(const void* at) { return _mm512_load_si512(at); }
inline __m512i words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }

// 32 states by element, in halves.
struct States {
    __m512i high, low;
};

inline States load_states(const uint32_t* state) {
    const auto half = [&](int shift) {
        const auto narrow = [&](const uint32_t* from) {
            return _mm512_cvtepi32_epi16(
                _mm512_srl_epi32(_mm512_loadu_si512(from), _mm_cvtsi32_si128(shift)));
        };
        return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(state)), narrow(state + 16), 1);
    };
    return {half(16), half(0)};
}

inline void store_states(const States& x, uint32_t* state) {
    alignas(64) uint16_t high[kLanes], low[kLanes];
    _mm512_store_si512(high, x.high);
    _mm512_store_si512(low, x.low);
    for (unsigned e = 0; e < kLanes; ++e) state[e] = uint32_t{high[e]} << 16 | low[e];
}

// Moves words out where the state has no room for the symbol, leaves the quotient in `x`, low half
// and the upper 4 of 20 bits with anything above them, and returns the rank.
[[gnu::always_inline]] inline __m512i take_quotient(States& x, const Divisor& by,
                                                    __mmask32 active, uint16_t*& out) {
    // x >= freq << 20; no frequency is 4096, so 16 times one fits.
    const __mmask32 spills =
        _mm512_mask_cmpge_epu16_mask(active, x.high, _mm512_slli_epi16(by.freq, 4));
    // The words behind those of this step are overwritten by those of the next one.
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(spills, x.low));
    out += count_bits(spills);
    const __m512i low = _mm512_mask_mov_epi16(x.low, spills, x.high);
    const __m512i high = _mm512_mask_sub_epi16(x.high, spills, x.high, x.high);
    const Divided divided = divide(high, low, by);
    x = {divided.high, divided.low};
    return divided.rank;
}

// x = quotient << 12 | slot
[[gnu::always_inline]] inline void place(States& x, __m512i slot) {
    x.high = _mm512_shldi_epi16(x.high, x.low, kProbBits);
    x.low = _mm512_or_si512(_mm512_slli_epi16(x.low, kProbBits), slot);
}

template <unsigned kRounds>
[[gnu::always_inline]] inline void encode_coarse(States& x, __m512i symbol,
                                                 const CoarseEncodeTable& table,
                                                 __mmask32 active, uint16_t*& out) {
    const auto reciprocal = [&](__m512i index) {
        if constexpr (kRounds == 3)
            return _mm512_permutexvar_ps(index, _mm512_load_ps(table.reciprocal));
        return _mm512_permutex2var_ps(_mm512_load_ps(table.reciprocal), index,
                                      _mm512_load_ps(table.reciprocal + 16));
    };
    const Divisor by{_mm512_permutexvar_epi16(symbol, load(table.freq)), reciprocal(symbol),
                     reciprocal(_mm512_srli_epi32(symbol, 16))};
    const __m512i first = _mm512_permutexvar_epi16(symbol, load(table.first));
    const __m512i position = _mm512_add_epi16(first, take_quotient(x, by, active, out));
    // Of 64 entries the upper half is for positions from begin[32] on: two look-ups, the second
    // under a mask, cost less than one in both halves.
    __mmask32 upper = 0;
    if constexpr (kRounds == 6)
        upper = _mm512_cmpge_epu16_mask(position, words(table.begin[32]));
    const auto entries = [&](const uint16_t* of, __m512i index) {
        const __m512i lower = _mm512_permutexvar_epi16(index, load(of));
        if constexpr (kRounds < 6) return lower;
        return _mm512_mask_permutexvar_epi16(lower, upper, index, load(of + 32));
    };
    __m512i part = _mm512_setzero_si512();
#pragma GCC unroll 5
    for (int half = 1 << (std::min(kRounds, 5u) - 1); half; half /= 2) {
        const __m512i middle = _mm512_add_epi16(part, words(half));
        const __mmask32 beyond = _mm512_cmple_epu16_mask(entries(table.begin, middle), position);
        part = _mm512_mask_mov_epi16(part, beyond, middle);
    }
    place(x, _mm512_add_epi16(position, entries(table.shift, part)));
}

// entry: only its low three bits count.
[[gnu::always_inline]] inline void encode_refined(States& x, __m512i entry,
                                                  const RefineEncodeTable& table,
                                                  __mmask32 active, uint16_t*& out) {
    const auto find = [&](const uint16_t* of) { return _mm512_permutexvar_epi16(entry, load(of)); };
    const __m512 reciprocals = _mm512_load_ps(table.reciprocal);
    const Divisor by{find(table.freq), _mm512_permutexvar_ps(entry, reciprocals),
                     _mm512_permutexvar_ps(_mm512_srli_epi32(entry, 16), reciprocals)};
    const __m512i rank = take_quotient(x, by, active, out);
    __m512i slot = _mm512_add_epi16(rank, find(table.base));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __mmask32 beyond = _mm512_cmpge_epu16_mask(rank, find(table.bound[i]));
        slot = _mm512_mask_add_epi16(slot, beyond, slot, find(table.more[i]));
    }
    place(x, slot);
}

template <unsigned kRefinements, unsigned kRounds, size_t kJobs>
void encode_all(const StepsJob* jobs) {
    constexpr unsigned kFirst = kRounds ? 0 : 1;  // pass
    __mmask32 active[kJobs];
    States states[kJobs][kRefinements + 1];
    // Copies, because the compiler must assume that storing words changes the runs.
    uint16_t* out[kJobs][kRefinements + 1];
    const uint16_t* models[kJobs][kRefinements + 1];
    for (size_t i = 0; i < kJobs; ++i) {
        active[i] = ~uint32_t{0} << (kLanes - jobs[i].lanes);
        for (unsigned pass = kFirst; pass <= kRefinements; ++pass) {
            states[i][pass] = load_states(jobs[i].runs[pass].state);
            out[i][pass] = jobs[i].runs[pass].words;
            models[i][pass] = jobs[i].runs[pass].models;
        }
    }
    for (size_t step = jobs->steps; step-- > 0;) {
#pragma GCC unroll 2
        for (size_t i = 0; i < kJobs; ++i) {
            const StepsJob& job = jobs[i];
            if constexpr (kRounds > 0) {
                const __m512i symbol = _mm512_cvtepu8_epi16(_mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(job.symbols + step * kLanes)));
                encode_coarse<kRounds>(states[i][0], symbol, job.coarse[models[i][0][step]],
                                       active[i], out[i][0]);
            }
            const __m512i code = _mm512_loadu_si512(job.codes + step * kLanes);
#pragma GCC unroll 5
            for (unsigned pass = 1; pass <= kRefinements; ++pass) {
                const __m512i entry = _mm512_srli_epi16(code, 3 * (pass - 1));
                encode_refined(states[i][pass], entry, job.refine[models[i][pass][step]],
                               active[i], out[i][pass]);
            }
        }
    }
    for (size_t i = 0; i < kJobs; ++i)
        for (unsigned pass = kFirst; pass <= kRefinements; ++pass) {
            // Idle lanes went through the motions; their states must stay.
            uint32_t state[kLanes];
            store_states(states[i][pass], state);
            const unsigned first = kLanes - jobs[i].lanes;
            std::memcpy(jobs[i].runs[pass].state + first, state + first,
                        sizeof state[0] * jobs[i].lanes);
            jobs[i].runs[pass].words = out[i][pass];
        }
}

// With many passes one stream fills the processor.
template <unsigned kRefinements, unsigned kRounds>
void encode_streams(const StepsJob* jobs, size_t count) {
    if constexpr (kRefinements <= 1)
        if (count == 2) return encode_all<kRefinements, kRounds, 2>(jobs);
    for (size_t i = 0; i < count; ++i) encode_all<kRefinements, kRounds, 1>(jobs + i);
}

template <unsigned kRefinements>
void encode_rounds(const StepsJob* jobs, size_t count) {
    switch (jobs->rounds) {
        case 0: return encode_streams<kRefinements, 0>(jobs, count);
        case 3: return encode_streams<kRefinements, 3>(jobs, count);
        case 5: return encode_streams<kRefinements, 5>(jobs, count);
        default: return encode_streams<kRefinements, 6>(jobs, count);
    }
}

}  // namespace

void encode_steps_avx512(const StepsJob* jobs, size_t count) {
    constexpr auto by_refinements = []<size_t... I>(std::index_sequence<I...>) {
        return std::array{encode_rounds<I>...};
    }(std::make_index_sequence<kMaxPasses>());
    by_refinements[jobs->refinements](jobs, count);
}

}  // namespace cachegen
