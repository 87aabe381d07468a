// Matrix products of attention in registers, on operands that lie in panels of kWide adjacent columns.
#pragma once

#include "flashsink.h"

namespace flashsink {

constexpr int64_t kLines = 6, kWide = 32;  // of a product

// Vectors of the width of a register, two for each of kLines: twelve of sixteen registers, or of 32 with AVX-512. GCC
// keeps wider ones in memory, which takes five times as long (bench/LOG.md).
struct Registers64 {
    typedef float Vector __attribute__((vector_size(64)));
};
struct Registers32 {
    typedef float Vector __attribute__((vector_size(32)));
};
struct Registers16 {
    typedef float Vector __attribute__((vector_size(16)));
};

FLASHSINK_INLINE int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// to (ceil(count / kWide), features, kWide): token t's feature c at [t / kWide][c][t % kWide]; 0 past the last token.
FLASHSINK_INLINE void turn(const float* from, int64_t stride, int64_t count, int64_t features, float* __restrict to) {
    for (int64_t t = 0; t < count; t += kWide, to += features * kWide) {
        const int64_t some = std::min(kWide, count - t);
        for (int64_t c = 0; c < features; ++c) {
            for (int64_t i = 0; i < some; ++i) to[c * kWide + i] = from[(t + i) * stride + c];
            for (int64_t i = some; i < kWide; ++i) to[c * kWide + i] = 0.0f;
        }
    }
}

// to (ceil(features / kWide), lines, kWide): feature c of token t at [c / kWide][t][c % kWide], times `factor`; 0 past
// the last.
FLASHSINK_INLINE void lay(const float* from, int64_t stride, int64_t count, int64_t features, int64_t lines,
                          float* __restrict to) {
    for (int64_t c = 0; c < features; c += kWide, to += lines * kWide) {
        const int64_t some = std::min(kWide, features - c);
        for (int64_t t = 0; t < count; ++t) {
            std::memcpy(to + t * kWide, from + t * stride + c, sizeof(float) * some);
            std::fill(to + t * kWide + some, to + (t + 1) * kWide, 0.0f);
        }
        std::fill(to + count * kWide, to + lines * kWide, 0.0f);
    }
}

// c (kLines, kWide) = a b, or c + a b: a (kLines, factors), or transposed (factors, kLines); b (factors, kWide).
template <class Registers, bool Transposed, bool Add>
FLASHSINK_INLINE void product(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                              int64_t factors) {
    typedef typename Registers::Vector Vector;
    constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
    for (int64_t j = 0; j < kWide; j += 2 * kLanes) {
        Vector sum[kLines][2];
#pragma GCC unroll 6
        for (int64_t r = 0; r < kLines; ++r) {
#pragma GCC unroll 2
            for (int64_t n = 0; n < 2; ++n) {
                if (Add) std::memcpy(&sum[r][n], c + r * c_stride + j + kLanes * n, sizeof(Vector));
                else sum[r][n] = Vector{};
            }
        }
        for (int64_t x = 0; x < factors; ++x) {
            Vector line[2];
#pragma GCC unroll 2
            for (int64_t n = 0; n < 2; ++n) std::memcpy(&line[n], b + x * kWide + j + kLanes * n, sizeof(Vector));
#pragma GCC unroll 6
            for (int64_t r = 0; r < kLines; ++r) {
                const float factor = Transposed ? a[x * a_stride + r] : a[r * a_stride + x];
#pragma GCC unroll 2
                for (int64_t n = 0; n < 2; ++n) sum[r][n] += line[n] * factor;
            }
        }
#pragma GCC unroll 6
        for (int64_t r = 0; r < kLines; ++r) {
#pragma GCC unroll 2
            for (int64_t n = 0; n < 2; ++n)
                std::memcpy(c + r * c_stride + j + kLanes * n, &sum[r][n], sizeof(Vector));
        }
    }
}

}  // namespace flashsink

// Defines name(args...), which runs the always-inline name##_body<Registers> for the instruction set found at run time.
#define FLASHSINK_DISPATCH_VECTORS(name)                                                   \
    template <class... Args>                                                               \
    FLASHSINK_AVX512 void name##_avx512(const Args&... args) { name##_body<flashsink::Registers64>(args...); }  \
    template <class... Args>                                                               \
    FLASHSINK_AVX2 void name##_avx2(const Args&... args) { name##_body<flashsink::Registers32>(args...); }      \
    template <class... Args>                                                               \
    void name##_baseline(const Args&... args) { name##_body<flashsink::Registers16>(args...); }                 \
    void name(const Problem& problem, const Work& work, int64_t count, float* memory) {    \
        if (flashsink::isa() == flashsink::kAvx512) name##_avx512(problem, work, count, memory); \
        else if (flashsink::isa() == flashsink::kAvx2) name##_avx2(problem, work, count, memory); \
        else name##_baseline(problem, work, count, memory);                                \
    }
