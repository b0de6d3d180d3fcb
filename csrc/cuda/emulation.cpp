// Runs the kernels on the host: see emulation.h. Built on demand as a shared library by
// src/cachegen/native/cuda/emulation.py; one launch at a time.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "kernels.cu"

namespace cachegen::emulation {

Lane current;

namespace {

constexpr size_t kStackBytes = 256 << 10;
using Kernel = void (*)(uint64_t);

// One block at a time: its lanes are fibres, resumed one after the other until each has met a
// collective; when a whole warp has, its lanes go on.
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Lane lane;
    bool done;
    unsigned meetings;        // collectives of the warp that this lane has come to
    unsigned block_meetings;  // the same of the block
    bool begun;
    jmp_buf jump;
    void* fake_stack;
};

struct Block {
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    unsigned running = 0;
    jmp_buf scheduler_jump;
    Gift gifts[32][2][32];  // by warp, by parity of the meeting
    Kernel kernel = nullptr;
    uint64_t argument = 0;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    void* scheduler_fake = nullptr;
};
Block block;

void to_scheduler(bool last) {
    Fibre& fibre = block.fibres[block.running];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fibre.fake_stack, block.scheduler_stack,
                                   block.scheduler_size);
#endif
    (void)last;
#if !defined(__SANITIZE_ADDRESS__)
    // Unlike swapcontext, these make no system calls.
    if (!_setjmp(fibre.jump)) _longjmp(block.scheduler_jump, 1);
#else
    swapcontext(&fibre.context, &block.scheduler);
    __sanitizer_finish_switch_fiber(block.fibres[block.running].fake_stack, &block.scheduler_stack,
                                    &block.scheduler_size);
#endif
}

void run_lane() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_size);
#endif
    block.kernel(block.argument);
    block.fibres[block.running].done = true;
    to_scheduler(true);
}

void resume(unsigned index) {
    block.running = index;
    Fibre& fibre = block.fibres[index];
    current = fibre.lane;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.scheduler_fake, fibre.stack.get(), kStackBytes);
    swapcontext(&block.scheduler, &fibre.context);
    __sanitizer_finish_switch_fiber(block.scheduler_fake, nullptr, nullptr);
#else
    if (_setjmp(block.scheduler_jump)) return;
    if (fibre.begun) _longjmp(fibre.jump, 1);
    fibre.begun = true;
    setcontext(&fibre.context);
#endif
}

// Lanes that have left the kernel no longer count, as on the device.
bool has_met(unsigned first, unsigned last, unsigned index, bool whole_block) {
    const Fibre& mine = block.fibres[index];
    for (unsigned i = first; i < last; ++i) {
        const Fibre& other = block.fibres[i];
        if (other.done) continue;
        if (whole_block ? other.block_meetings < mine.block_meetings
                        : other.meetings < mine.meetings)
            return false;
    }
    return true;
}

}  // namespace

const Gift* exchange(const Gift& gift) {
    const unsigned index = block.running, warp = index / 32;
    Fibre& fibre = block.fibres[index];
    const unsigned parity = fibre.meetings++ & 1;
    block.gifts[warp][parity][index % 32] = gift;
    while (!has_met(warp * 32, warp * 32 + 32, index, false)) to_scheduler(false);
    return block.gifts[warp][parity];
}

void wait_for_block() {
    const unsigned index = block.running;
    ++block.fibres[index].block_meetings;
    while (!has_met(0, static_cast<unsigned>(block.fibres.size()), index, true))
        to_scheduler(false);
}

}  // namespace cachegen::emulation

extern "C" int cachegen_emulate(const char* name, unsigned grid, unsigned threads,
                                unsigned shared_bytes, uint64_t argument) {
    using namespace cachegen::emulation;
    struct Entry {
        const char* name;
        Kernel kernel;
    };
    static constexpr Entry kEntries[] = {
        {"build_tables", cachegen::build_tables},
        {"map_rows", cachegen::map_rows},
        {"rope_table", cachegen::rope_table},
        {"put_exempt", cachegen::put_exempt},
        {"decode_rows", cachegen::decode_rows},
        {"copy_rows", cachegen::copy_rows},
        {"decode_progressive_1", cachegen::decode_progressive_1},
        {"decode_progressive_2", cachegen::decode_progressive_2},
        {"decode_progressive_3", cachegen::decode_progressive_3},
        {"decode_progressive_4", cachegen::decode_progressive_4},
        {"decode_progressive_5", cachegen::decode_progressive_5},
        {"decode_progressive_6", cachegen::decode_progressive_6},
        {"transform_back", cachegen::transform_back},
        {"finish_values", cachegen::finish_values},
        {"build_inverses", cachegen::build_inverses},
        {"load_values", cachegen::load_values},
        {"column_medians", cachegen::column_medians},
        {"row_norms", cachegen::row_norms},
        {"survey_columns", cachegen::survey_columns},
        {"survey_tokens", cachegen::survey_tokens},
        {"find_outliers", cachegen::find_outliers},
        {"set_means", cachegen::set_means},
        {"find_odd", cachegen::find_odd},
        {"sum_squares", cachegen::sum_squares},
        {"count_bins", cachegen::count_bins},
        {"measure_errors", cachegen::measure_errors},
        {"choose_step", cachegen::choose_step},
        {"fit_classes", cachegen::fit_classes},
        {"choose_offset", cachegen::choose_offset},
        {"encode_progressive", cachegen::encode_progressive},
        {"quantise_rows", cachegen::quantise_rows},
        {"fit_parametric", cachegen::fit_parametric},
        {"fit_frequencies", cachegen::fit_frequencies},
        {"encode_rows", cachegen::encode_rows},
        {"copy_spans", cachegen::copy_spans},
        {"write_plain", cachegen::write_plain},
        {"split_rows", cachegen::split_rows},
        {"transform_forward", cachegen::transform_forward},
    };
    const Entry* entry = nullptr;
    for (const Entry& one : kEntries)
        if (std::strcmp(one.name, name) == 0) entry = &one;
    if (!entry || threads == 0 || threads % 32 || threads > 1024) return 1;

    block.kernel = entry->kernel;
    block.argument = argument;
    block.fibres.resize(threads);
    // Exactly as much as was asked for, so that AddressSanitizer sees what is beyond.
    uint4* const shared = static_cast<uint4*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16 + 16));
    for (unsigned b = 0; b < grid; ++b) {
        for (unsigned t = 0; t < threads; ++t) {
            Fibre& fibre = block.fibres[t];
            if (!fibre.stack) fibre.stack = std::make_unique<char[]>(kStackBytes);
            fibre.lane = Lane{t, b, reinterpret_cast<uint8_t*>(shared)};
            fibre.done = fibre.begun = false;
            fibre.meetings = fibre.block_meetings = 0;
            fibre.fake_stack = nullptr;
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = kStackBytes;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, run_lane, 0);
        }
        for (bool any = true; any;) {
            any = false;
            for (unsigned t = 0; t < threads; ++t) {
                if (block.fibres[t].done) continue;
                any = true;
                resume(t);
            }
        }
    }
    std::free(shared);
    return 0;
}
