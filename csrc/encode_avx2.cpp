// Counts, code lengths and the entropy coder of `progressive` for AVX2. The 32 states of a pass are
// four registers of 16-bit halves, tables are looked up byte by byte (docs/entropy-coding.md).
#include "encode_avx2.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "count_coarse_avx2.h"

namespace cachegen {
namespace {

constexpr unsigned kHalf = kLanes / 2;  // elements of a register of 16 bits

// Entry m moves the elements whose bits are set in m to the front, in order.
constexpr auto kGatherWords = [] {
    std::array<std::array<uint8_t, 16>, 256> table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        unsigned next = 0;
        for (unsigned element = 0; element < 8; ++element)
            if (mask >> element & 1) {
                table[mask][next++] = static_cast<uint8_t>(2 * element);
                table[mask][next++] = static_cast<uint8_t>(2 * element + 1);
            }
        for (; next < 16; ++next) table[mask][next] = 0x80;
    }
    return table;
}();

inline __m256i words(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline __m128i load_half(const void* at) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
}
inline __m256i load(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}
inline __m256i at_least(__m256i a, __m256i b) {  // 16-bit, unsigned
    return _mm256_cmpeq_epi16(_mm256_max_epu16(a, b), a);
}

// 16 states by element, in halves.
struct States {
    __m256i high, low;
};

inline States load_states(const uint32_t* state) {
    // Packing works within halves of 128 bits; the permutation undoes that.
    const __m256i a = load(state), b = load(state + 8), low = _mm256_set1_epi32(0xffff);
    const auto pack = [](__m256i x, __m256i y) {
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xd8);
    };
    return {pack(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)),
            pack(_mm256_and_si256(a, low), _mm256_and_si256(b, low))};
}

inline void store_states(const States& x, uint32_t* state) {
    alignas(32) uint16_t high[kHalf], low[kHalf];
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), x.high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), x.low);
    for (unsigned e = 0; e < kHalf; ++e) state[e] = uint32_t{high[e]} << 16 | low[e];
}

// Writes the chosen elements, which are bytes of a mask, and moves on.
inline void put_words(__m256i from, __m256i chosen, uint16_t*& out) {
    const auto both = static_cast<uint32_t>(_mm256_movemask_epi8(
        _mm256_packs_epi16(chosen, _mm256_setzero_si256())));
    const auto put = [&](__m128i eight, unsigned mask) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm_shuffle_epi8(eight, load_half(kGatherWords[mask].data())));
        out += std::popcount(mask);
    };
    put(_mm256_castsi256_si128(from), both & 255);
    put(_mm256_extracti128_si256(from, 1), both >> 16 & 255);
}

// 8 floats of states whose halves are in the even elements of two registers.
inline __m256 float_of(__m256i high, __m256i low) {
    // Both are exact, so their sum is rounded once, as a conversion of 32 bits would be.
    return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(65536.0f)),
                         _mm256_cvtepi32_ps(low));
}

// Moves words out where a state has no room for its symbol, leaves the quotient in `x`, low half
// and the upper 4 of 20 bits, and returns the rank. reciprocal(i): of even or odd elements.
template <class Reciprocal>
[[gnu::always_inline]] inline __m256i divide(States& x, __m256i freq, const Reciprocal& reciprocal,
                                             __m256i active, uint16_t*& out) {
    // x >= freq << 20, that is high / 16 >= freq.
    const __m256i spills =
        _mm256_and_si256(active, at_least(_mm256_srli_epi16(x.high, 4), freq));
    put_words(x.low, spills, out);
    const __m256i low = _mm256_blendv_epi8(x.low, x.high, spills);
    const __m256i high = _mm256_andnot_si256(spills, x.high);
    const __m256i mask = _mm256_set1_epi32(0xffff);
    const auto quotient_of = [&](__m256i high_half, __m256i low_half, __m256 by) {
        return _mm256_cvttps_epi32(_mm256_mul_ps(float_of(high_half, low_half), by));
    };
    const __m256i even = quotient_of(_mm256_and_si256(high, mask), _mm256_and_si256(low, mask),
                                     reciprocal(0));
    const __m256i odd = quotient_of(_mm256_srli_epi32(high, 16), _mm256_srli_epi32(low, 16),
                                    reciprocal(1));
    const __m256i quotient_low = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    const __m256i quotient_high = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    const __m256i rank = _mm256_sub_epi16(low, _mm256_mullo_epi16(quotient_low, freq));
    const __m256i one_less = at_least(rank, freq);  // all ones are -1
    x.low = _mm256_sub_epi16(quotient_low, one_less);
    const __m256i carry =
        _mm256_and_si256(one_less, _mm256_cmpeq_epi16(x.low, _mm256_setzero_si256()));
    x.high = _mm256_sub_epi16(quotient_high, carry);
    return _mm256_sub_epi16(rank, _mm256_and_si256(one_less, freq));
}

// x = quotient << 12 | slot
inline void place(States& x, __m256i slot) {
    x.high = _mm256_or_si256(_mm256_slli_epi16(x.high, kProbBits),
                             _mm256_srli_epi16(x.low, 16 - kProbBits));
    x.low = _mm256_or_si256(_mm256_slli_epi16(x.low, kProbBits), slot);
}

[[gnu::always_inline]] inline void encode_refined(States& x, __m256i entry,
                                                  const RefineEncodeTable& table, __m256i active,
                                                  uint16_t*& out) {
    // Indices of the two bytes of an element.
    const __m256i index =
        _mm256_add_epi16(_mm256_mullo_epi16(entry, words(0x0202)), words(0x0100));
    const auto find = [&](const uint16_t* of) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(of)), index);
    };
    const auto reciprocal = [&](int odd) {
        return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.reciprocal),
                                        odd ? _mm256_srli_epi32(entry, 16) : entry);
    };
    const __m256i rank = divide(x, find(table.freq), reciprocal, active, out);
    __m256i slot = _mm256_add_epi16(rank, find(table.base));
    for (int i = 0; i < 2; ++i)
        slot = _mm256_add_epi16(slot, _mm256_and_si256(at_least(rank, find(table.bound[i])),
                                                       find(table.more[i])));
    place(x, slot);
}

// Tables of 32 and 64 entries have no look-up here, but nearly all values are 0 in pass 0: that one
// is looked up once, and a register with others one by one.
[[gnu::always_inline]] inline void encode_coarse(States& x, const uint8_t* symbols,
                                                 const CoarseEncodeTable& table, __m256i active,
                                                 uint16_t*& out) {
    const __m128i symbol = load_half(symbols);
    alignas(32) uint16_t freqs[kHalf], positions[kHalf], slots[kHalf];
    alignas(32) float reciprocals[2][kHalf / 2];
    const bool zeros = _mm_testz_si128(symbol, symbol);
    if (!zeros) {
        for (unsigned e = 0; e < kHalf; ++e) {
            freqs[e] = table.freq[symbols[e]];
            positions[e] = table.first[symbols[e]];
            reciprocals[e % 2][e / 2] = table.reciprocal[symbols[e]];
        }
    }
    const auto reciprocal = [&](int odd) {
        return zeros ? _mm256_set1_ps(table.reciprocal[0]) : _mm256_load_ps(reciprocals[odd]);
    };
    const __m256i freq = zeros ? words(table.freq[0]) : load(freqs);
    const __m256i rank = divide(x, freq, reciprocal, active, out);
    const __m256i position = zeros ? rank : _mm256_add_epi16(rank, load(positions));
    if (zeros && table.begin[8] >= table.freq[0]) {
        // The runs of 0 come first: add what each one moves further.
        __m256i slot = _mm256_add_epi16(position, words(table.shift[0]));
        for (unsigned run = 1; table.begin[run] < table.freq[0]; ++run) {
            const int more = table.shift[run] - table.shift[run - 1];
            slot = _mm256_add_epi16(
                slot, _mm256_and_si256(at_least(position, words(table.begin[run])), words(more)));
        }
        return place(x, slot);
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(positions), position);
    for (unsigned e = 0; e < kHalf; ++e) {
        unsigned part = 0;
        for (unsigned half = 32; half; half /= 2)
            part += half * (table.begin[part + half] <= positions[e]);
        slots[e] = static_cast<uint16_t>(positions[e] + table.shift[part]);
    }
    place(x, load(slots));
}

inline uint32_t bits_of(__m256i bytes) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
inline uint32_t count(uint32_t bits) { return static_cast<uint32_t>(std::popcount(bits)); }

void encode_stream_steps(const StepsJob& job) {
    // Element e is active from kLanes - lanes on.
    alignas(32) uint16_t masks[kLanes];
    for (unsigned e = 0; e < kLanes; ++e) masks[e] = e < kLanes - job.lanes ? 0 : 0xffff;
    const __m256i active[2] = {load(masks), load(masks + kHalf)};
    States states[kMaxPasses][2];
    uint16_t* out[kMaxPasses];
    const unsigned first_pass = job.rounds ? 0 : 1;
    for (unsigned pass = first_pass; pass <= job.refinements; ++pass) {
        for (unsigned i = 0; i < 2; ++i)
            states[pass][i] = load_states(job.runs[pass].state + i * kHalf);
        out[pass] = job.runs[pass].words;
    }
    for (size_t step = job.steps; step-- > 0;) {
        if (first_pass == 0) {
            const CoarseEncodeTable& coarse = job.coarse[job.runs[0].models[step]];
            for (unsigned i = 0; i < 2; ++i)
                encode_coarse(states[0][i], job.symbols + step * kLanes + i * kHalf, coarse,
                              active[i], out[0]);
        }
        const uint16_t* const codes = job.codes + step * kLanes;
        for (unsigned pass = 1; pass <= job.refinements; ++pass) {
            const RefineEncodeTable& table = job.refine[job.runs[pass].models[step]];
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(3 * (pass - 1)));
            for (unsigned i = 0; i < 2; ++i) {
                const __m256i entry = _mm256_and_si256(
                    _mm256_srl_epi16(load(codes + i * kHalf), shift), words(7));
                encode_refined(states[pass][i], entry, table, active[i], out[pass]);
            }
        }
    }
    for (unsigned pass = first_pass; pass <= job.refinements; ++pass) {
        // Idle lanes went through the motions; their states must stay.
        uint32_t state[kLanes];
        for (unsigned i = 0; i < 2; ++i) store_states(states[pass][i], state + i * kHalf);
        const unsigned first = kLanes - job.lanes;
        std::memcpy(job.runs[pass].state + first, state + first, sizeof state[0] * job.lanes);
        job.runs[pass].words = out[pass];
    }
}

}  // namespace

void encode_steps_avx2(const StepsJob* jobs, size_t count) {
    for (size_t i = 0; i < count; ++i) encode_stream_steps(jobs[i]);
}

void count_channel_avx2(const uint16_t* codes, const uint8_t* symbols, const uint8_t*,
                        size_t places, size_t stride, unsigned refinements, uint32_t* counts) {
    std::fill_n(counts, kMaxCounts, 0u);
    for (size_t place = 0; place < places; ++place) {
        const __m256i first = load(codes + place * stride);
        const __m256i second = load(codes + place * stride + kHalf);
        for (unsigned pass = 0; pass < refinements; ++pass) {
            const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(3 * pass));
            const auto field = [&](__m256i code) {
                return _mm256_and_si256(_mm256_srl_epi16(code, shift), words(7));
            };
            // Its three bits moved to the top of a byte; the order of bytes does not matter.
            const __m256i bytes = _mm256_packus_epi16(field(first), field(second));
            const uint32_t one = bits_of(_mm256_slli_epi16(bytes, 7));
            const uint32_t two = bits_of(_mm256_slli_epi16(bytes, 6));
            const uint32_t seen = bits_of(_mm256_slli_epi16(bytes, 5));
            uint32_t* const of = counts + kCoarseCounts + kRefineCounts * pass;
            of[0] += count(~(one | two | seen));
            of[1] += count(one & ~seen);
            of[2] += count(two & ~seen);
            of[3] += count(seen & ~(one | two));
            of[4] += count(one & seen);
            of[5] += count(two & seen);
        }
    }
    count_coarse(symbols, places, stride, counts);
}

// 8 tokens by 16 elements at a time: interleaving row i with row i + 4 three times turns 8 x 8
// elements in each half of the registers.
void read_tile_avx2(const std::byte* const* memory, size_t count, float* rows) {
    constexpr size_t kWidth = 16, kHeight = 8;
    const size_t whole = count / kWidth * kWidth;
    for (size_t begin = 0; begin < whole; begin += kWidth)
        for (size_t e = 0; e < kLanes; e += kHeight) {
            __m256i tile[kHeight];
#pragma GCC unroll 8
            for (size_t i = 0; i < kHeight; ++i) tile[i] = load(memory[e + i] + 2 * begin);
#pragma GCC unroll 3
            for (int round = 0; round < 3; ++round) {
                __m256i next[kHeight];
#pragma GCC unroll 4
                for (size_t i = 0; i < kHeight / 2; ++i) {
                    next[2 * i] = _mm256_unpacklo_epi16(tile[i], tile[i + 4]);
                    next[2 * i + 1] = _mm256_unpackhi_epi16(tile[i], tile[i + 4]);
                }
#pragma GCC unroll 8
                for (size_t i = 0; i < kHeight; ++i) tile[i] = next[i];
            }
#pragma GCC unroll 8
            for (size_t i = 0; i < kHeight; ++i) {
                const auto put = [&](size_t row, __m128i bits) {
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + row * kLanes + e),
                                        _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
                };
                put(begin + i, _mm256_castsi256_si128(tile[i]));
                put(begin + i + kHeight, _mm256_extracti128_si256(tile[i], 1));
            }
        }
    for (size_t i = whole; i < count; ++i)
        for (size_t e = 0; e < kLanes; ++e) {
            uint16_t bits;
            std::memcpy(&bits, memory[e] + 2 * i, sizeof bits);
            rows[i * kLanes + e] = KVTraits<KVType::BFloat16>::to_float(bits);
        }
}

unsigned code_lengths_avx2(const uint16_t* counts, const int16_t* costs, size_t size,
                           uint32_t* lengths) {
    constexpr size_t kRegisters = 8, kEach = 8;  // ways of a register
    static_assert(kWays % (kRegisters * kEach) == 0);
    __m256i least = _mm256_set1_epi32(-1);
    for (size_t way = 0; way < kWays; way += kRegisters * kEach) {
        __m256i sums[kRegisters];
#pragma GCC unroll 8
        for (__m256i& sum : sums) sum = _mm256_setzero_si256();
        for (size_t pair = 0; pair < size / 2; ++pair) {
            int both;
            std::memcpy(&both, counts + 2 * pair, sizeof both);
            if (!both) continue;
            const __m256i times = _mm256_set1_epi32(both);
            const int16_t* const row = costs + 2 * (pair * kWays + way);
#pragma GCC unroll 8
            for (size_t i = 0; i < kRegisters; ++i)
                sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(times, load(row + 16 * i)));
        }
#pragma GCC unroll 8
        for (size_t i = 0; i < kRegisters; ++i) {
            least = _mm256_min_epu32(least, sums[i]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(lengths + way + kEach * i), sums[i]);
        }
    }
    uint32_t each[kEach];
    std::memcpy(each, &least, sizeof each);
    return static_cast<unsigned>(
        std::find(lengths, lengths + kWays, *std::min_element(each, each + kEach)) - lengths);
}

}  // namespace cachegen
