#include "dispatch.h"

#include <atomic>
#include <cstring>

#include "fastalign_native.h"
#include "threads.h"

namespace fastalign {
namespace {

constexpr struct {
    Isa isa;
    const char *name;
} NAMES[] = {{Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::neon, "neon"}, {Isa::scalar, "scalar"}};  // best first

constexpr int BEST = -1;
std::atomic<int> selected{BEST};

Isa best() noexcept {
    for (const auto &known : NAMES) {
        if (has(known.isa)) return known.isa;
    }
    return Isa::scalar;
}

}  // namespace

bool has(Isa isa) noexcept {
    switch (isa) {
        case Isa::scalar: return true;
#if defined(FASTALIGN_X86)  // these look at what the operating system saves, too
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(FASTALIGN_ARM64)  // part of every AArch64
        case Isa::neon: return true;
#endif
        default: return false;
    }
}

bool has_avx512_bf16() noexcept {
#if defined(FASTALIGN_X86)
    return has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Isa isa() noexcept {
    static const Isa found = best();
    const int choice = selected.load(std::memory_order_relaxed);
    return choice == BEST ? found : static_cast<Isa>(choice);
}

}  // namespace fastalign

extern "C" {

int fastalign_version(void) { return FASTALIGN_VERSION; }

const char *fastalign_threading(void) { return fastalign::threading(); }

const char *fastalign_isa(void) {
    for (const auto &known : fastalign::NAMES) {
        if (known.isa == fastalign::isa()) return known.name;
    }
    return "scalar";
}

int fastalign_select_isa(const char *name) {
    if (!name) return FASTALIGN_BAD_ARGUMENT;
    if (!std::strcmp(name, "best")) {
        fastalign::selected.store(fastalign::BEST, std::memory_order_relaxed);
        return FASTALIGN_OK;
    }
    for (const auto &known : fastalign::NAMES) {
        if (!std::strcmp(name, known.name) && fastalign::has(known.isa)) {
            fastalign::selected.store(static_cast<int>(known.isa), std::memory_order_relaxed);
            return FASTALIGN_OK;
        }
    }
    return FASTALIGN_UNSUPPORTED;
}

}  // extern "C"
