// Kernels for AArch64, whose processors all have NEON. docs/entropy-coding.md derives them. The 32
// states of a stream are eight registers of 16-bit halves; tables are looked up byte by byte.
#include <arm_neon.h>

#include <array>
#include <bit>

#include "block_portable.h"
#include "dispatch.h"
#include "encode_rows.h"
#include "ladder_rows.h"
#include "lossless_rows.h"
#include "quantize_rows.h"
#include "symbol_rows.h"
#include "rans_simd.h"

namespace cachegen {
namespace {

// Entry m moves the first words of a register to the elements whose bits are set in m, in order,
// and zeros to all others: an index beyond the table gives 0.
constexpr auto kSpreadWords = [] {
    std::array<std::array<uint8_t, 16>, 256> table{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        uint8_t next = 0;
        for (unsigned element = 0; element < 8; ++element) {
            const bool takes = mask >> element & 1;
            table[mask][2 * element] = takes ? next++ : uint8_t{0xff};
            table[mask][2 * element + 1] = takes ? next++ : uint8_t{0xff};
        }
    }
    return table;
}();

struct Neon {
    static constexpr size_t kSideBySide = 2;

    // 16-bit values of all lanes, 8 to a register.
    struct Wide {
        uint16x8_t part[4];
    };
    // Bytes of all lanes, 16 to a register.
    struct Bytes {
        uint8x16_t part[2];
    };
    struct Lanes {
        Wide high, low;
    };
    using Active = uint32_t;  // bit l is lane l

    static Active active_lanes(unsigned count) { return ~uint32_t{0} >> (kLanes - count); }

    static Lanes load(const uint32_t* state) {
        Lanes x;
        for (int i = 0; i < 4; ++i) {
            const uint32x4_t a = vld1q_u32(state + 8 * i), b = vld1q_u32(state + 8 * i + 4);
            x.low.part[i] = vcombine_u16(vmovn_u32(a), vmovn_u32(b));
            x.high.part[i] = vcombine_u16(vshrn_n_u32(a, 16), vshrn_n_u32(b, 16));
        }
        return x;
    }

    static void store(const Lanes& x, uint32_t* state) {
        for (int i = 0; i < 4; ++i) {
            vst1q_u32(state + 8 * i,
                      vreinterpretq_u32_u16(vzip1q_u16(x.low.part[i], x.high.part[i])));
            vst1q_u32(state + 8 * i + 4,
                      vreinterpretq_u32_u16(vzip2q_u16(x.low.part[i], x.high.part[i])));
        }
    }

    static Bytes narrow(const Wide& x) {
        Bytes bytes;
        for (int i = 0; i < 2; ++i)
            bytes.part[i] =
                vcombine_u8(vmovn_u16(x.part[2 * i]), vmovn_u16(x.part[2 * i + 1]));
        return bytes;
    }
    static Wide join(const Bytes& low, const Bytes& high) {
        Wide x;
        for (int i = 0; i < 2; ++i) {
            x.part[2 * i] = vreinterpretq_u16_u8(vzip1q_u8(low.part[i], high.part[i]));
            x.part[2 * i + 1] = vreinterpretq_u16_u8(vzip2q_u8(low.part[i], high.part[i]));
        }
        return x;
    }

    // Looks up bytes in a table of 16, 32 or 64.
    template <unsigned kSize>
    static Bytes find(const void* table, const Bytes& index) {
        const auto* at = static_cast<const uint8_t*>(table);
        Bytes found;
        for (int i = 0; i < 2; ++i) {
            if constexpr (kSize == 16) found.part[i] = vqtbl1q_u8(vld1q_u8(at), index.part[i]);
            if constexpr (kSize == 32) found.part[i] = vqtbl2q_u8(vld1q_u8_x2(at), index.part[i]);
            if constexpr (kSize == 64) found.part[i] = vqtbl4q_u8(vld1q_u8_x4(at), index.part[i]);
        }
        return found;
    }

    // What a table knows about the part of each lane's slot.
    struct Parts {
        Wide freq, bias;
        Bytes symbol;
    };

    template <unsigned K>
    static Parts look_up(const Wide& slot, const AliasTable* table, const uint8_t* contexts) {
        if constexpr (K == kContextBuckets) return look_up_in_pair(slot, table, contexts);
        constexpr int width_bits = kProbBits - std::countr_zero(K);
        Wide wide_bucket, wide_offset;
        for (int i = 0; i < 4; ++i) {
            wide_bucket.part[i] = vshrq_n_u16(slot.part[i], width_bits);
            wide_offset.part[i] = vandq_u16(slot.part[i], vdupq_n_u16((1 << width_bits) - 1));
        }
        const Bytes bucket = narrow(wide_bucket), offset = narrow(wide_offset);
        const Bytes cut = find<K>(table->cut, bucket);
        Bytes part;
        for (int i = 0; i < 2; ++i) {
            const uint8x16_t is_other = vcgeq_u8(offset.part[i], cut.part[i]);
            part.part[i] = vaddq_u8(bucket.part[i], vandq_u8(is_other, vdupq_n_u8(K)));
        }
        return {join(find<2 * K>(table->freq_low, part), find<2 * K>(table->freq_high, part)),
                join(find<2 * K>(table->bias_low, part), find<2 * K>(table->bias_high, part)),
                find<2 * K>(table->symbol, part)};
    }

    // The tables of both contexts side by side: 8 parts each.
    static Parts look_up_in_pair(const Wide& slot, const AliasTable* table,
                                 const uint8_t* contexts) {
        const AliasTable &a = table[0], &b = table[1];
        const auto bytes_of = [](const uint16_t* entries) {
            return vreinterpretq_u8_u16(vld1q_u16(entries));
        };
        const uint8x16_t thresholds = vcombine_u8(vget_low_u8(bytes_of(a.threshold)),
                                                  vget_low_u8(bytes_of(b.threshold)));
        const uint8x16x2_t freqs = {{bytes_of(a.freq), bytes_of(b.freq)}};
        const uint8x16x2_t biases = {{bytes_of(a.bias), bytes_of(b.bias)}};
        const uint8x16_t symbols = vcombine_u8(vld1_u8(a.symbol), vld1_u8(b.symbol));
        // Indices of the two bytes of an element.
        const auto pair_of = [](uint16x8_t index) {
            return vreinterpretq_u8_u16(
                vmlaq_n_u16(vdupq_n_u16(0x0100), index, 0x0202));
        };
        Parts parts;
        Wide numbers;
        for (int i = 0; i < 4; ++i) {
            const uint16x8_t context = vmovl_u8(vld1_u8(contexts + 8 * i));
            const uint16x8_t in_table = vshrq_n_u16(slot.part[i], kProbBits - 2);
            const uint16x8_t bucket = vaddq_u16(vshlq_n_u16(context, 2), in_table);
            const uint16x8_t threshold =
                vreinterpretq_u16_u8(vqtbl1q_u8(thresholds, pair_of(bucket)));
            const uint16x8_t is_other = vcgeq_u16(slot.part[i], threshold);
            const uint16x8_t part =
                vaddq_u16(vaddq_u16(vshlq_n_u16(context, 3), in_table),
                          vandq_u16(is_other, vdupq_n_u16(kContextBuckets)));
            const uint8x16_t index = pair_of(part);
            parts.freq.part[i] = vreinterpretq_u16_u8(vqtbl2q_u8(freqs, index));
            parts.bias.part[i] = vreinterpretq_u16_u8(vqtbl2q_u8(biases, index));
            numbers.part[i] = part;
        }
        const Bytes part = narrow(numbers);
        for (int i = 0; i < 2; ++i) parts.symbol.part[i] = vqtbl1q_u8(symbols, part.part[i]);
        return parts;
    }

    template <unsigned K>
    [[gnu::always_inline]] static size_t decode_step(Lanes& x, Active active,
                                                     const AliasTable* table,
                                                     const uint8_t* contexts,
                                                     const uint8_t* words, uint8_t* symbols) {
        Wide slot;
        for (int i = 0; i < 4; ++i)
            slot.part[i] = vandq_u16(x.low.part[i], vdupq_n_u16(kTotal - 1));
        const Parts parts = look_up<K>(slot, table, contexts);
        vst1q_u8(symbols, parts.symbol.part[0]);
        vst1q_u8(symbols + 16, parts.symbol.part[1]);

        size_t taken = 0;
        for (int i = 0; i < 4; ++i) {
            // x = freq * (x >> 12) + rank. The quotient has 20 bits: its low 16 and its top 4.
            const uint16x8_t freq = parts.freq.part[i];
            const uint16x8_t quotient = vorrq_u16(vshlq_n_u16(x.high.part[i], 16 - kProbBits),
                                                  vshrq_n_u16(x.low.part[i], kProbBits));
            const uint16x8_t top = vshrq_n_u16(x.high.part[i], kProbBits);
            const uint16x8_t rank = vaddq_u16(slot.part[i], parts.bias.part[i]);
            const uint16x8_t low = vmlaq_u16(rank, freq, quotient);
            const uint16x8_t product_high = vcombine_u16(
                vshrn_n_u32(vmull_u16(vget_low_u16(freq), vget_low_u16(quotient)), 16),
                vshrn_n_u32(vmull_high_u16(freq, quotient), 16));
            // A carry is -1.
            const uint16x8_t carry = vcltq_u16(low, rank);
            const uint16x8_t high = vsubq_u16(vmlaq_u16(product_high, freq, top), carry);

            // Where the high half is 0, the low one moves up and the next word takes its place.
            const uint16x8_t bits = {1, 2, 4, 8, 16, 32, 64, 128};
            const uint16x8_t hungry = vceqzq_u16(high);
            const unsigned mask =
                vaddvq_u16(vandq_u16(hungry, bits)) & (active >> (8 * i) & 255);
            const uint8x16_t next = vld1q_u8(words + 2 * taken);
            const uint16x8_t spread =
                vreinterpretq_u16_u8(vqtbl1q_u8(next, vld1q_u8(kSpreadWords[mask].data())));
            x.high.part[i] = vbslq_u16(hungry, low, high);
            x.low.part[i] = vbslq_u16(hungry, spread, low);
            taken += count_bits(mask);
        }
        return taken;
    }
};

}  // namespace

constinit const Kernels kNeonKernels = {
    .isa = "neon",
    .is_available = [] { return true; },
    .decode_runs = decode_runs<Neon>,
    .encode_runs = encode_runs_scalar,
    .build_alias = nullptr,
    .build_inverse = nullptr,
    .scatter = scatter,
    .gather = gather,
    .decode_coarse = nullptr,
    .decode_refine = nullptr,
    .find_bytes = find_bytes,
    .coarse_values = coarse_values,
    .value_contexts = value_contexts,
    .refine_values = refine_values,
    .finish_unit = {finish_unit<KVType::Float16>, finish_unit<KVType::BFloat16>,
                    finish_unit<KVType::Float32>},
    .fill_lookup = {},
    .turn_means = {turn_means<KVType::Float16>, turn_means<KVType::BFloat16>,
                   turn_means<KVType::Float32>},
    .scale_rows = scale_rows,
    .finish_row = {finish_row<KVType::Float16>, finish_row<KVType::BFloat16>,
                   finish_row<KVType::Float32>},
    .encode_rows = encode_rows(),
    .angle_lanes = kLanesInOrder,
    .per_type = {row_kernels<KVType::Float16>(), row_kernels<KVType::BFloat16>(),
                 row_kernels<KVType::Float32>()},
    .symbol_rows = symbol_rows(),
    .lossless_rows = {lossless_rows<KVType::Float16>(), lossless_rows<KVType::BFloat16>(),
                      lossless_rows<KVType::Float32>()},
};

}  // namespace cachegen
