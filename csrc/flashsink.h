// What the native CPU kernels share: element types, the choice of instruction set, threads and units of work.
//
// Shapes: h (rows, tokens, C) with unit stride over the C features and any stride over rows and tokens.
// A sequence is one row, or with `packed` one of several in row 0; it begins at token starts[n] with BOS.
// All strides and sizes count elements. No torch header is used: one build serves every release of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#define FLASHSINK_API extern "C" __attribute__((visibility("default")))
#define FLASHSINK_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FLASHSINK_AVX2 __attribute__((target("avx2,fma")))
#define FLASHSINK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define FLASHSINK_AVX2
#define FLASHSINK_AVX512
#endif

namespace flashsink {

enum Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
int isa();  // library.cpp

// Tokens in one unit of work. Fixed, and each unit's partial sums are added in order, so results do not depend
// on the number of threads.
constexpr int64_t kChunk = 64;

struct Bf16 {
    uint16_t bits;
};

FLASHSINK_INLINE float widen(float x) { return x; }
FLASHSINK_INLINE float widen(Bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

FLASHSINK_INLINE void narrow(float x, float* out) { *out = x; }
FLASHSINK_INLINE void narrow(float x, Bf16* out) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40u;
    out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

struct Tokens {  // h as it was passed
    const void* data;
    int64_t row_stride, token_stride, rows, tokens, features;
    bool packed;

    template <class T>
    FLASHSINK_INLINE const T* at(int64_t row, int64_t token) const {
        return static_cast<const T*>(data) + row * row_stride + token * token_stride;
    }
    int64_t row_of(int64_t sequence) const { return packed ? 0 : sequence; }
    // how many of `threads` are worth waking: one more for every 65,536 elements (about 20 us of reading)
    int workers(int threads) const {
        return static_cast<int>(std::min<int64_t>(threads, 1 + rows * tokens * features / 65536));
    }
};

struct Unit {  // tokens [first, last) of a sequence
    int64_t sequence, first, last;
};

// [first, last) of one sequence in pieces of kChunk tokens.
inline void cut(std::vector<Unit>& units, int64_t sequence, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token += kChunk)
        units.push_back({sequence, token, std::min(token + kChunk, last)});
}

// body(index, worker) for every index below count; a loop without OpenMP for one thread, which is safe after a fork.
template <class Body>
void parallel(int64_t count, int threads, Body body) {
    int workers = static_cast<int>(std::min<int64_t>(threads, count));
#ifdef _OPENMP
    if (workers > 1) {
#pragma omp parallel for num_threads(workers) schedule(static)
        for (int64_t index = 0; index < count; ++index) body(index, omp_get_thread_num());
        return;
    }
#endif
    for (int64_t index = 0; index < count; ++index) body(index, 0);
}

}  // namespace flashsink

// Defines name(args...), which runs the always-inline name##_body compiled for the instruction set found at run
// time. Vectorization happens after inlining, so the three copies differ though the source is one.
#define FLASHSINK_DISPATCH(name)                                        \
    template <class T, class... Args>                                   \
    FLASHSINK_AVX512 auto name##_avx512(const Args&... args) {          \
        return name##_body<T>(args...);                                 \
    }                                                                   \
    template <class T, class... Args>                                   \
    FLASHSINK_AVX2 auto name##_avx2(const Args&... args) {              \
        return name##_body<T>(args...);                                 \
    }                                                                   \
    template <class T, class... Args>                                   \
    auto name##_baseline(const Args&... args) {                         \
        return name##_body<T>(args...);                                 \
    }                                                                   \
    template <class T, class... Args>                                   \
    auto name(const Args&... args) {                                    \
        if (flashsink::isa() == flashsink::kAvx512) return name##_avx512<T>(args...); \
        if (flashsink::isa() == flashsink::kAvx2) return name##_avx2<T>(args...);     \
        return name##_baseline<T>(args...);                             \
    }
