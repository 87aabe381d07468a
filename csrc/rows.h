// Operations on the features of one token, shared by the standalone kernels and the norm: its largest |h|, and its
// term of the decorrelation loss, max(cos^2(a, h) - margin, 0) with a = h at BOS.
//
// With d = <a, h>, squared norms clamped at 1e-24 and 0 where margin wins:
//   w = 2 d / (|a|^2 |h|^2)      d cos^2 / dh = w (a - p h),  p = d / |h|^2 (0 where |h|^2 is clamped)
//                                d cos^2 / da = w (h - q a),  q = d / |a|^2 (0 where |a|^2 is clamped)
//
// A sink is nearly parallel to BOS: a - p h is then a thousandth of a. So d and the norms are summed in float64
// (exact products; memory is the limit anyway), and p and q are applied as a float32 pair, high and low part.
#pragma once

#include "flashsink.h"

namespace flashsink {

constexpr double kLeast = 1e-24;   // F.normalize divides by at least 1e-12
constexpr int64_t kFeatures = 64;  // features between two looks at the maximum so far

// Absolute values are compared as integers: the order is that of the numbers, infinity is above them and NaN above
// that, so ties are exact.
FLASHSINK_INLINE int32_t magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}
FLASHSINK_INLINE int16_t magnitude(Bf16 x) { return static_cast<int16_t>(x.bits & 0x7fff); }

FLASHSINK_INLINE float value_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
FLASHSINK_INLINE float value_of(int16_t bits) { return widen(Bf16{static_cast<uint16_t>(bits)}); }

// Largest |x| and the lowest feature that reaches it. NaN is larger than all, and all NaN are alike.
template <class T>
FLASHSINK_INLINE void largest_of(const T* x, int64_t features, float* max_abs, int32_t* feature) {
    using Bits = decltype(magnitude(T{}));
    Bits top = -1;
    int64_t block = 0;
    for (int64_t base = 0; base < features; base += kFeatures) {
        const int64_t end = std::min(base + kFeatures, features);
        Bits here = 0;
#pragma omp simd reduction(max : here)
        for (int64_t c = base; c < end; ++c) here = std::max(here, magnitude(x[c]));
        if (here > top) {
            top = here;
            block = base;
        }
    }
    const float value = value_of(std::max<Bits>(top, 0));
    const bool nan = value != value;
    int64_t index = nan ? 0 : block;
    while (index < features && (nan ? value_of(magnitude(x[index])) == value_of(magnitude(x[index]))
                                    : magnitude(x[index]) != top))
        ++index;
    *max_abs = value;
    *feature = static_cast<int32_t>(index);
}

struct Pair {
    float high, low;
    explicit Pair(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<float>(x))) {}
};

template <class T>
FLASHSINK_INLINE double square_sum(const T* x, int64_t features) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < features; ++c) sum += static_cast<double>(widen(x[c])) * widen(x[c]);
    return sum;
}

struct Angle {
    double dot, h_sq;  // <a, h> and |h|^2
};

template <class T>
FLASHSINK_INLINE Angle angle_of(const T* h, const T* bos, int64_t features) {
    double dot = 0.0, h_sq = 0.0;
#pragma omp simd reduction(+ : dot, h_sq)
    for (int64_t c = 0; c < features; ++c) {
        double x = widen(h[c]), y = widen(bos[c]);
        dot += x * y;
        h_sq += x * x;
    }
    return {dot, h_sq};
}

struct Term {
    double value, w, p, q;  // value: max(cos^2 - margin, 0)
};

// a_sq = |a|^2
FLASHSINK_INLINE Term term_of(const Angle& angle, double a_sq, double margin) {
    const double inverse_a = 1.0 / (a_sq < kLeast ? kLeast : a_sq);
    const double inverse_h = 1.0 / (angle.h_sq < kLeast ? kLeast : angle.h_sq);
    const double value = (angle.dot * inverse_a) * (angle.dot * inverse_h) - margin;
    const bool off = value < 0.0;  // false for NaN, which must be seen
    return {off ? 0.0 : value, off ? 0.0 : 2.0 * angle.dot * inverse_a * inverse_h,
            angle.h_sq < kLeast ? 0.0 : angle.dot * inverse_h, a_sq < kLeast ? 0.0 : angle.dot * inverse_a};
}

// sum (C) += w (h - q a), the token's part of the gradient of BOS.
template <class T>
FLASHSINK_INLINE void add_dbos(const T* h, const T* bos, const Term& term, int64_t features,
                                   float* __restrict sum) {
    const Pair q(term.q);
    const float weight = static_cast<float>(term.w);
#pragma omp simd
    for (int64_t c = 0; c < features; ++c) {
        float x = widen(h[c]), y = widen(bos[c]);
        sum[c] += weight * ((x - q.high * y) - q.low * y);
    }
}

FLASHSINK_INLINE int64_t inside(int64_t value, int64_t limit) {
    return std::min(std::max<int64_t>(value, 0), limit);
}

// out (C) = the parts (count, C) added in their order.
inline void add_up(const float* parts, int64_t count, int64_t features, float* out) {
    std::fill(out, out + features, 0.0f);
    for (int64_t index = 0; index < count; ++index)
        for (int64_t c = 0; c < features; ++c) out[c] += parts[index * features + c];
}

}  // namespace flashsink
