// Threads for one call. They are started by the call and are gone when it returns: nothing lives on
// in a process that forks, and they inherit the cores that the caller is pinned to.
#pragma once

#include <exception>
#include <thread>
#include <vector>

namespace cachegen {

// Runs work(0) to work(count - 1), the first one in this thread. Exceptions: of those thrown, the
// one of the lowest index is rethrown when all are done.
template <class Work>
void run_crew(size_t count, const Work& work) {
    std::vector<std::exception_ptr> errors(count ? count : 1);
    const auto guarded = [&](size_t index) {
        try {
            work(index);
        } catch (...) {
            errors[index] = std::current_exception();
        }
    };
    {
        std::vector<std::jthread> threads;
        for (size_t index = 1; index < count; ++index) {
            // Without a thread its share falls to the others, as all take from one queue.
            try {
                threads.emplace_back(guarded, index);
            } catch (const std::system_error&) {
                break;
            }
        }
        guarded(0);
    }
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace cachegen
