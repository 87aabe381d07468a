// The decorrelation loss of one layer: sum over sequences and tokens 1 <= s < span of max(cos^2(a, h) - margin, 0)
// with a = h at BOS, and its gradient.
//
// Shapes: h, dh (rows, tokens, C); starts, spans (sequences); scalars (rows, tokens, 2) = w, p of a counted token;
// bos_gradient (sequences, C). With d = <a, h>, squared norms clamped at 1e-24 and 0 where margin wins:
//   w = 2 d / (|a|^2 |h|^2)      d cos^2 / dh = w (a - p h),  p = d / |h|^2 (0 where |h|^2 is clamped)
//                                d cos^2 / da = w (h - q a),  q = d / |a|^2 (0 where |a|^2 is clamped)
// The forward adds up the second, so that the backward needs nothing from other tokens and h is read once in each.
//
// A sink is nearly parallel to BOS: a - p h is then a thousandth of a. So d and the norms are summed in float64
// (exact products; memory is the limit anyway), and p and q are applied as a float32 pair, high and low part.
#include "flashsink.h"

namespace {

using namespace flashsink;

constexpr double kLeast = 1e-24;  // F.normalize divides by at least 1e-12

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

struct Chunk {  // forward over the counted tokens of one unit
    int64_t tokens, token_stride, features;
    double margin;
    double* scalars;  // (tokens, 2)
    float* sum;       // (C), this unit's part of the BOS gradient
};

// Returns the unit's sum of max(cos^2 - margin, 0).
template <class T>
FLASHSINK_INLINE double forward_body(const Chunk& chunk, const T* const& bos, const T* const& first) {
    const int64_t features = chunk.features;
    const double own = square_sum(bos, features);
    const double inverse_a = 1.0 / (own < kLeast ? kLeast : own);
    float* __restrict sum = chunk.sum;
    std::fill(sum, sum + features, 0.0f);
    double total = 0.0;
    for (int64_t s = 0; s < chunk.tokens; ++s) {
        const T* h = first + s * chunk.token_stride;
        double dot = 0.0, square = 0.0;
#pragma omp simd reduction(+ : dot, square)
        for (int64_t c = 0; c < features; ++c) {
            double x = widen(h[c]), y = widen(bos[c]);
            dot += x * y;
            square += x * x;
        }
        const double inverse_h = 1.0 / (square < kLeast ? kLeast : square);
        const double over = (dot * inverse_a) * (dot * inverse_h) - chunk.margin;
        const bool off = over < 0.0;  // false for NaN, which must be seen
        const double w = off ? 0.0 : 2.0 * dot * inverse_a * inverse_h;
        chunk.scalars[2 * s] = w;
        chunk.scalars[2 * s + 1] = square < kLeast ? 0.0 : dot * inverse_h;
        if (off || w == 0.0) continue;
        total += over;
        const Pair q(own < kLeast ? 0.0 : dot * inverse_a);
        const float weight = static_cast<float>(w);
#pragma omp simd
        for (int64_t c = 0; c < features; ++c) {
            float x = widen(h[c]), y = widen(bos[c]);
            sum[c] += weight * ((x - q.high * y) - q.low * y);
        }
    }
    return total;
}
FLASHSINK_DISPATCH(forward)

struct Slice {  // backward over the tokens [first, last) of a row, whose sequence begins at start
    int64_t row, first, last, start, span;
    float upstream;
    const double* scalars;      // (tokens, 2) of the row
    const float* bos_gradient;  // (C) of the sequence
};

template <class T>
FLASHSINK_INLINE int backward_body(const Tokens& h, const Slice& slice, T* const& gradient) {
    const int64_t features = h.features;
    const T* bos = h.at<T>(slice.row, slice.start);
    for (int64_t token = slice.first; token < slice.last; ++token) {
        T* __restrict out = gradient + token * features;
        const bool counted = token > slice.start && token < slice.start + slice.span;
        const double w = counted ? slice.scalars[2 * token] : 0.0;
        if (token == slice.start && slice.span > 1) {
            const float* sum = slice.bos_gradient;
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) narrow(slice.upstream * sum[c], out + c);
        } else if (w != 0.0) {
            const T* x = h.at<T>(slice.row, token);
            const Pair p(slice.scalars[2 * token + 1]);
            const float weight = static_cast<float>(slice.upstream * w);
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) {
                float own = widen(x[c]), a = widen(bos[c]);
                narrow(weight * ((a - p.high * own) - p.low * own), out + c);
            }
        } else {
            std::memset(static_cast<void*>(out), 0, static_cast<size_t>(features) * sizeof(T));
        }
    }
    return 0;
}
FLASHSINK_DISPATCH(backward)

int64_t inside(int64_t value, int64_t limit) { return std::min(std::max<int64_t>(value, 0), limit); }

template <class T>
void forward_all(const Tokens& h, const int64_t* starts, const int64_t* spans, int64_t sequences, double margin,
                 float* total, double* scalars, float* bos_gradient, int threads) {
    std::vector<Unit> units;
    std::vector<int64_t> begin(static_cast<size_t>(sequences) + 1, 0);
    for (int64_t n = 0; n < sequences; ++n) {
        const int64_t start = inside(starts[n], h.tokens);
        cut(units, n, start + 1, start + inside(spans[n], h.tokens - start));
        begin[n + 1] = static_cast<int64_t>(units.size());
    }
    const int64_t count = static_cast<int64_t>(units.size()), features = h.features;
    std::vector<float> parts(static_cast<size_t>(count * features));
    std::vector<double> sums(units.size(), 0.0);
    parallel(count, h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t row = h.row_of(unit.sequence);
        Chunk chunk{unit.last - unit.first, h.token_stride, features, margin,
                    scalars + 2 * (row * h.tokens + unit.first), parts.data() + index * features};
        sums[index] = forward<T>(chunk, h.at<T>(row, inside(starts[unit.sequence], h.tokens)),
                                 h.at<T>(row, unit.first));
    });
    for (int64_t n = 0; n < sequences; ++n) {
        float* out = bos_gradient + n * features;
        std::fill(out, out + features, 0.0f);
        for (int64_t index = begin[n]; index < begin[n + 1]; ++index) {
            const float* part = parts.data() + index * features;
            for (int64_t c = 0; c < features; ++c) out[c] += part[c];
        }
    }
    double all = 0.0;
    for (double sum : sums) all += sum;
    *total = static_cast<float>(all);
}

template <class T>
void backward_all(const Tokens& h, const int64_t* starts, const int64_t* spans, int64_t sequences, float upstream,
                  const double* scalars, const float* bos_gradient, void* gradient, int threads) {
    // every token of dh is written by exactly one sequence: padding by the one before it, or the first
    std::vector<Unit> units;
    for (int64_t n = 0; n < sequences; ++n) {
        const bool first = !h.packed || n == 0, last = !h.packed || n == sequences - 1;
        cut(units, n, first ? 0 : inside(starts[n], h.tokens), last ? h.tokens : inside(starts[n + 1], h.tokens));
    }
    parallel(static_cast<int64_t>(units.size()), h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t row = h.row_of(unit.sequence), start = inside(starts[unit.sequence], h.tokens);
        Slice slice{row, unit.first, unit.last, start, inside(spans[unit.sequence], h.tokens - start), upstream,
                    scalars + 2 * row * h.tokens, bos_gradient + unit.sequence * h.features};
        backward<T>(h, slice, static_cast<T*>(gradient) + row * h.tokens * h.features);
    });
}

}  // namespace

// All functions return 0, or 1 where memory is short. starts and spans are cut to the tokens there are; packed
// starts must not fall.
FLASHSINK_API int flashsink_decorrelation_forward(const void* h, int bf16, int64_t row_stride, int64_t token_stride,
                                                  int64_t rows, int64_t tokens, int64_t features,
                                                  const int64_t* starts, const int64_t* spans, int64_t sequences,
                                                  int packed, double margin, float* total, double* scalars,
                                                  float* bos_gradient, int threads) try {
    const Tokens view{h, row_stride, token_stride, rows, tokens, features, packed != 0};
    auto run = bf16 ? forward_all<Bf16> : forward_all<float>;
    run(view, starts, spans, sequences, margin, total, scalars, bos_gradient, threads);
    return 0;
} catch (...) {
    return 1;
}

FLASHSINK_API int flashsink_decorrelation_backward(const void* h, int bf16, int64_t row_stride, int64_t token_stride,
                                                   int64_t rows, int64_t tokens, int64_t features,
                                                   const int64_t* starts, const int64_t* spans, int64_t sequences,
                                                   int packed, const float* upstream, const double* scalars,
                                                   const float* bos_gradient, void* gradient, int threads) try {
    const Tokens view{h, row_stride, token_stride, rows, tokens, features, packed != 0};
    auto run = bf16 ? backward_all<Bf16> : backward_all<float>;
    run(view, starts, spans, sequences, *upstream, scalars, bos_gradient, gradient, threads);
    return 0;
} catch (...) {
    return 1;
}
