// Counts the instructions of the hot loops of every backend that this machine can run: a figure
// that load, clock and caches cannot move. scripts/instruction_guard.py compares it.
//
// With the trap flag set, the processor stops after every instruction, and a signal handler counts.
// That needs no performance counters, which virtual machines often lack, and sees any instruction
// set. Every loop runs twice, over few and over more rows; the difference leaves out what a call
// costs. Input is the same in every run.
//
// Prints "compiler NAME VERSION", then a line "ISA KERNEL INSTRUCTIONS SYMBOLS" for each loop.
// Exits with 77 where instructions cannot be counted.
#include <cstdio>

#if defined(__x86_64__) && defined(__linux__)
#include <x86intrin.h>

#include <csignal>
#include <string>
#include <vector>

#include "dispatch.h"
#include "encode_tables.h"

using namespace cachegen;

namespace {

#ifdef __clang__
constexpr const char* kCompiler = "Clang";
constexpr int kVersion[] = {__clang_major__, __clang_minor__, __clang_patchlevel__};
#else
constexpr const char* kCompiler = "GNU";
constexpr int kVersion[] = {__GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__};
#endif

volatile uint64_t counted;

template <class Function>
[[gnu::noinline]] uint64_t count(const Function& function) {
    constexpr uint64_t kTrapFlag = 0x100;
    counted = 0;
    __writeeflags(__readeflags() | kTrapFlag);
    function();
    __writeeflags(__readeflags() & ~kTrapFlag);
    return counted;
}

void two_a_round(uint64_t rounds) {
    asm volatile("1: dec %0\n jnz 1b" : "+r"(rounds) : : "cc");
}

bool counting_works() {
    const uint64_t few = count([] { two_a_round(100); });
    return count([] { two_a_round(200); }) - few == 200;
}

// xorshift64*
class Random {
public:
    uint32_t bits() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
    }
    uint32_t below(uint32_t n) { return bits() % n; }

private:
    uint64_t state_ = 88172645463325252;
};

constexpr size_t kFew = 16, kMore = 2 * kFew;  // steps, or lots of them
constexpr size_t kModels = 8;
constexpr unsigned kCoarseSymbols = 32;
constexpr int kLateBelow = 3;

// Each symbol has about 3/4 of the frequency of the one before; none has 0.
Tables make_tables(size_t alphabet, bool with_escapes, size_t count = kModels) {
    std::vector<uint16_t> freqs;
    for (size_t n = 0; n < count; ++n) {
        unsigned left = kTotal;
        for (size_t i = alphabet; i-- > 1;) {
            const unsigned rest = left - static_cast<unsigned>(i);
            freqs.push_back(static_cast<uint16_t>(1 + rest / (4 + n % kModels)));
            left -= freqs.back();
        }
        freqs.push_back(static_cast<uint16_t>(left));
    }
    const std::vector<uint8_t> escapes(with_escapes ? count : 0,
                                       static_cast<uint8_t>(alphabet - 1));
    return Tables(freqs, escapes, count, alphabet);
}

struct alignas(64) Values {
    int16_t at[kBlockSteps * kLanes];
};
struct alignas(64) Floats {
    float at[kBlockSteps * kLanes];
};
struct alignas(64) Bytes {
    uint8_t at[kBlockSteps * kLanes];
};

// What the kernels of one backend read and write.
struct Work {
    const Kernels& kernel;
    Tables coarse = make_tables(kCoarseSymbols, true), narrow = make_tables(16, false),
           refine = make_tables(3, false),
           refine_pairs = make_tables(3, false, 2 * kModels);
    std::vector<uint16_t> models = std::vector<uint16_t>(kBlockSteps);
    std::vector<uint8_t> words = std::vector<uint8_t>(2 * kLanes * 2 * kBlockSteps);
    std::vector<uint16_t> encoded = std::vector<uint16_t>(kLanes * kBlockSteps);
    std::vector<uint32_t> escaped = std::vector<uint32_t>(kBlockSteps);
    Bytes symbols{}, contexts{}, digits{}, out[kGroupStreams]{};
    Values values{}, sums[kGroupStreams]{};

    explicit Work(const Kernels& of) : kernel(of) {
        Random random;
        // Even ones: context 0 of a pair.
        for (uint16_t& model : models) model = static_cast<uint16_t>(2 * random.below(kModels / 2));
        for (uint8_t& byte : words) byte = static_cast<uint8_t>(random.bits());
        for (size_t i = 0; i < kBlockSteps * kLanes; ++i) {
            symbols.at[i] = static_cast<uint8_t>(random.below(7));
            digits.at[i] = static_cast<uint8_t>(random.below(3));
            values.at[i] = static_cast<int16_t>(static_cast<int>(random.below(11)) - 5);
            contexts.at[i] = values.at[i] != 0;
        }
    }

    // A row of the result: the loop over kFew and over kMore times `lot` steps.
    template <class Function>
    void row(const char* name, size_t symbols_a_step, size_t lot, const Function& function) {
        const auto measure = [&](size_t steps) {
            for (Values& sum : sums) sum = values;
            return count([&] { function(steps); });
        };
        measure(kFew * lot);  // the first call of a library function looks it up
        const uint64_t few = measure(kFew * lot), more = measure(kMore * lot);
        std::printf("%s %s %llu %zu\n", std::string(kernel.isa).c_str(), name,
                    static_cast<unsigned long long>(more - few),
                    (kMore - kFew) * lot * symbols_a_step);
    }

    // The same streams for every decoder: any words decode to something.
    template <class Decoder>
    void decode(const char* name, bool with_contexts, const Decoder& decoder) {
        row(name, kGroupStreams * kLanes, 1, [&](size_t steps) {
            DecodeRun runs[kGroupStreams];
            DecodeRun* pointers[kGroupStreams];
            for (size_t i = 0; i < kGroupStreams; ++i) {
                DecodeRun& run = runs[i];
                for (uint32_t lane = 0; lane < kLanes; ++lane)
                    run.state[lane] = kStateMin + 0x01234567u * (lane + 1);
                run.words = words.data();
                run.words_end = words.data() + words.size() - kWordSlack;
                run.models = models.data();
                run.contexts = with_contexts ? contexts.at : nullptr;
                run.symbols = out[i].at;
                run.values = sums[i].at;
                run.escaped = escaped.data();
                run.late_below = kLateBelow;
                run.lanes = kLanes;
                run.starved = false;
                pointers[i] = &run;
            }
            decoder(pointers, steps);
        });
    }

    void encode(const char* name, const InverseTable* tables, unsigned buckets,
                const Bytes& from) {
        row(name, kLanes, 1, [&](size_t steps) {
            EncodeRun run{};
            for (uint32_t& state : run.state) state = kStateMin;
            run.words = encoded.data() + encoded.size();
            run.models = models.data();
            run.contexts = buckets == kContextBuckets ? contexts.at : nullptr;
            run.symbols = from.at;
            run.lanes = kLanes;
            EncodeRun* const only = &run;
            kernel.encode_runs(tables, buckets, &only, 1, steps);
        });
    }

    void all_decoders() {
        const auto plain = [&](const Tables& tables, unsigned buckets) {
            return [&kernel = kernel, alias = tables.alias(buckets), buckets](
                       DecodeRun* const* runs, size_t steps) {
                kernel.decode_runs(alias, buckets, runs, kGroupStreams, steps);
            };
        };
        decode("decode_32", false, plain(coarse, 32));
        decode("decode_16", false, plain(narrow, 16));
        decode("decode_contexts", true, plain(refine, kContextBuckets));
        if (kernel.decode_coarse)
            decode("decode_coarse", false, [&, tables = coarse.coarse()](auto runs, size_t steps) {
                kernel.decode_coarse(tables, runs, kGroupStreams, steps);
            });
        if (kernel.decode_refine)
            decode("decode_refine", false, [&, tables = refine.refine()](auto runs, size_t steps) {
                kernel.decode_refine(tables, kLateBelow, runs, kGroupStreams, steps);
            });
    }

    // One head of 32 tokens from values to bfloat16 rows.
    void finish(const char* name, bool with_rope) {
        constexpr size_t kSize = kMore * 4;
        static const std::vector<float> zeros(kSize * kLanes);
        static Values scratch[2], lookup[2];
        std::byte* rows[kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane)
            rows[lane] = reinterpret_cast<std::byte*>(out) + lane * 2 * kSize;
        constexpr auto type = static_cast<size_t>(KVType::BFloat16);
        const auto job_of = [&](size_t size) {
            UnitJob job{};
            job.values = values.at;
            job.size = size;
            job.scaling = {kLateBelow, 0.5f, 0.25f};
            job.early_offset = job.late_offset = job.mean = zeros.data();
            if (with_rope) job.cos = job.sin = zeros.data();
            job.half = with_rope ? size / 2 : 0;
            job.rows = rows;
            job.scratch = scratch;
            return job;
        };
        if (kernel.fill_lookup[type]) kernel.fill_lookup[type](job_of(kSize), lookup);
        row(name, kLanes, 4, [&](size_t size) {
            UnitJob job = job_of(size);
            if (kernel.fill_lookup[type]) job.lookup = lookup;
            kernel.finish_unit[type](job);
        });
    }

    void ladder() {
        if (!kernel.decode_coarse)
            row("coarse_values", kLanes, 1, [&](size_t steps) {
                kernel.coarse_values(symbols.at, steps, sums[0].at);
            });
        if (!kernel.decode_refine) {
            row("value_contexts", kLanes, 1, [&](size_t steps) {
                kernel.value_contexts(values.at, steps, out[0].at);
            });
            row("refine_values", kLanes, 1, [&](size_t steps) {
                kernel.refine_values(digits.at, kLateBelow, steps, sums[0].at);
            });
        }
        finish("finish_unit", false);
        finish("finish_unit_rope", true);
    }

    // The loops of the encoder of all passes, with two refinements as elsewhere here.
    void encoder() {
        constexpr unsigned kRefinements = 2;
        const LadderEncodeRows& rows = kernel.encode_rows;
        static Floats floats, sums, lanes;
        static std::vector<float> zeros(kBlockSteps);
        for (size_t i = 0; i < kBlockSteps * kLanes; ++i) floats.at[i] = 1.7f * values.at[i];
        const std::vector<uint32_t> keep(kLanes, ~uint32_t{0});
        std::vector<uint32_t> largest(kLanes), counts(kMaxCounts), lengths(kWays);
        const std::byte* memory[kLanes];
        for (size_t lane = 0; lane < kLanes; ++lane)
            memory[lane] = reinterpret_cast<const std::byte*>(values.at) + 128 * lane;
        row("encode_tile", kLanes, 2, [&](size_t count) {
            rows.read_tile[static_cast<size_t>(KVType::BFloat16)](memory, count, sums.at);
        });
        row("encode_turn", kLanes, 2, [&](size_t count) {
            rows.turn_back(sums.at, count / 2, false, floats.at, floats.at, 0);
        });
        row("encode_survey", kLanes, 1, [&](size_t count) {
            rows.survey_rows(floats.at, count, 1.5f, zeros.data(), keep.data(), sums.at, lanes.at,
                             largest.data());
        });
        static Values codes;
        std::vector<uint8_t> tallies(kBlockSteps * kTally);
        const bool tally = rows.tallies[kRefinements];
        row("encode_quantize", kLanes, 1, [&](size_t count) {
            rows.quantize_rows[kRefinements](
                {floats.at, count, 1.5f, zeros.data(), 0.5f, keep.data(),
                 reinterpret_cast<uint16_t*>(codes.at), out[0].at, nullptr, lanes.at,
                 tally ? tallies.data() : nullptr});
        });
        // What this backend makes of the values is what it counts and codes.
        rows.quantize_rows[kRefinements](
            {floats.at, kBlockSteps, 1.5f, zeros.data(), 0.5f, keep.data(),
             reinterpret_cast<uint16_t*>(codes.at), out[0].at, nullptr, lanes.at});
        const auto* const code = reinterpret_cast<const uint16_t*>(codes.at);
        row("encode_count", kLanes, 1, [&](size_t places) {
            rows.count_channel(code, out[0].at, tally ? tallies.data() : nullptr, places, kLanes,
                               kRefinements, counts.data());
        });
        const std::vector<int16_t> costs(kMore * 2 * kWays, 3);
        const std::vector<uint16_t> ones(kMore * 2, 1);
        row("encode_lengths", 2, 1, [&](size_t pairs) {
            rows.code_lengths(ones.data(), costs.data(), 2 * pairs, lengths.data());
        });
        const EncodeTables tables(coarse, refine_pairs);
        row("encode_steps", kLanes * (kRefinements + 1), 1, [&](size_t steps) {
            PassRun runs[kRefinements + 1];
            for (unsigned pass = 0; pass <= kRefinements; ++pass) {
                for (uint32_t& state : runs[pass].state) state = kStateMin;
                runs[pass].words = encoded.data() + pass * (kMore + 1) * kLanes;
                runs[pass].models = models.data();
            }
            const StepsJob job{code, out[0].at, steps, kLanes, kRefinements, 6, tables.coarse(),
                               tables.refine(), runs};
            rows.encode_steps(&job, 1);
        });
    }

    // Between the entropy coder and the quantiser of `int8` and `cachegen`.
    void planes() {
        const SymbolRows& rows = kernel.symbol_rows;
        const std::vector<uint8_t> offsets(kBlockSteps, 3);
        row("rotate_block", kLanes, 4, [&](size_t steps) {
            rows.rotate_block(offsets.data(), steps, kLanes, out[0].at);
        });
        row("add_low_digits", 1, 4, [&](size_t size) {
            rows.add_low_digits({words.data(), kBlockSteps, 0, 3}, 3, 4, size, out[0].at);
        });
        row("dequantize", 1, 4, [&](size_t size) {
            constexpr auto type = static_cast<size_t>(KVType::BFloat16);
            kernel.per_type[type].dequantize(symbols.at, size, 7.0f, 0.5f, out[0].at);
        });
        constexpr size_t kAlphabet = 15;
        std::vector<uint32_t> counts(kCountedChannels * kAlphabet);
        row("count_symbols", kCountedChannels, 1, [&](size_t tokens) {
            rows.count(symbols.at, kCountedChannels, tokens, kCountedChannels, 0, kAlphabet,
                       counts.data());
        });
        constexpr size_t kClasses = 112, kValues = 32;
        const std::vector<int16_t> costs(kClasses * kValues, 1500);
        const std::vector<uint16_t> some(kValues, 2);
        const uint16_t* const rotated[kRotations] = {some.data(), some.data(), some.data()};
        std::vector<uint32_t> bits(kRotations * kClasses);
        row("best_class", kRotations * kValues, kClasses / kMore, [&](size_t classes) {
            rows.best_class(rotated, costs.data(), classes, bits.data());
        });
    }

    void run() {
        all_decoders();
        encode("encode_32", coarse.inverse(32), 32, symbols);
        encode("encode_contexts", refine.inverse(kContextBuckets), kContextBuckets, digits);
        // One block or two: some kernels turn part of a block as if it were whole.
        row("scatter", kLanes * kBlockSteps / kFew, 1, [&](size_t steps) {
            for (; steps; steps -= kFew)
                kernel.scatter(symbols.at, kBlockSteps, out[0].at, kBlockSteps, kLanes);
        });
        ladder();
        encoder();
        planes();
    }
};

}  // namespace

int main() {
    struct sigaction action {};
    action.sa_handler = [](int) { counted = counted + 1; };
    sigaction(SIGTRAP, &action, nullptr);
    if (!counting_works()) {
        std::puts("this machine does not stop after every instruction");
        return 77;
    }
    std::printf("compiler %s %d.%d.%d\n", kCompiler, kVersion[0], kVersion[1], kVersion[2]);
    for (const Kernels* backend : backends()) {
        if (!backend->is_available()) continue;
        Work(*backend).run();
    }
}
#else
int main() {
    std::puts("instructions are counted on x86-64 Linux only");
    return 77;
}
#endif
