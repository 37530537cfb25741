#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>

namespace fastalign {
namespace {

// The entry that GNU OpenMP has for a parallel region, and that LLVM's and Intel's runtimes provide for its sake. It is
// looked up instead of linked: a wheel of torch brings a runtime under a name of its own, and linking would add a second.
using Parallel = void (*)(void (*region)(void *), void *data, unsigned threads, unsigned flags);

Parallel openmp() noexcept {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Work {
    void (*task)(void *, int64_t);
    void *context;
    int64_t count;
    std::atomic<int64_t> next{0};
};

void run(void *data) noexcept {
    Work &work = *static_cast<Work *>(data);
    for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.task(work.context, i);
}

// The threads of one call. There is no pool to keep: starting a thread takes some 20 us, and nothing idles, spins, or is
// lost in a fork. Threads that cannot be started are threads fewer.
void run_on_threads(Work &work, int threads) noexcept {
    const std::unique_ptr<std::thread[]> others(new (std::nothrow) std::thread[threads - 1]);
    int started = 0;
    if (others) {
        try {
            for (; started < threads - 1; ++started) others[started] = std::thread(run, &work);
        } catch (...) {
        }
    }
    run(&work);
    for (int k = 0; k < started; ++k) others[k].join();
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*task)(void *, int64_t), void *context) noexcept {
    Work work{task, context, count};
    const int team = static_cast<int>(std::min<int64_t>(threads, count));
    if (team <= 1) {
        run(&work);
    } else if (const Parallel parallel = openmp()) {
        parallel(run, &work, static_cast<unsigned>(team), 0);
    } else {
        run_on_threads(work, team);
    }
}

const char *threading() noexcept { return openmp() ? "openmp" : "threads"; }

}  // namespace fastalign
