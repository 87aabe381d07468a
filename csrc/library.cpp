// The library itself: version of its C interface and the instruction set it runs on.
#include <atomic>

#include "flashsink.h"

namespace {

int detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return flashsink::kBaseline;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? flashsink::kAvx512 : flashsink::kAvx2;
#else
    return flashsink::kBaseline;
#endif
}

std::atomic<int> chosen{-1};

}  // namespace

int flashsink::isa() {
    int level = chosen.load(std::memory_order_relaxed);
    if (level < 0) {
        level = detect();
        chosen.store(level, std::memory_order_relaxed);
    }
    return level;
}

// Raised with every change of an exported function, so that a stale build is refused instead of misread.
FLASHSINK_API int flashsink_abi_version() { return 4; }

// Uses at most `level` (0 baseline, 1 AVX2, 2 AVX-512) of what the processor has, and returns the level in use.
FLASHSINK_API int flashsink_limit_isa(int level) {
    chosen.store(std::min(std::max(level, 0), detect()), std::memory_order_relaxed);
    return flashsink::isa();
}
