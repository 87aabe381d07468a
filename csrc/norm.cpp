// RMSNorm as Llama has it, with one layer's decorrelation loss and largest activations computed in the same pass over
// every row, and one backward for both.
//
// Shapes: h, out, dout, dh (rows, tokens, C); weight, dweight (C); starts, lengths, spans (sequences);
// rstd, max_abs float32 and feature int32 (rows, tokens); scalars (rows, tokens, 2) and dbos (sequences, C) as
// in decorrelation.cpp, both null without a loss. With r = rstd and g = weight * dout:
//   out = weight * round(r h)     dh = r (g - h r^2 <g, h> / C) + dtotal * (the loss's gradient), rounded once
//   dweight = sum over tokens of dout * round(r h)
#include <cmath>

#include "rows.h"

namespace {

using namespace flashsink;

struct Norm {  // what every token of a call shares
    const void* weight;
    const int64_t *starts, *lengths, *spans;  // spans: null without a loss
    int64_t sequences;
    double eps, margin;
    float* rstd;
    float* max_abs;
    int32_t* feature;
    double* scalars;
    void* out;
};

struct Part {  // tokens [first, last) of a row, whose sequence begins at start
    int64_t row, first, last, start, end, span_end;
    float* dbos_part;  // (C)
};

// Returns the part's sum of max(cos^2 - margin, 0).
template <class T>
FLASHSINK_INLINE double forward_body(const Tokens& h, const Norm& norm, const Part& part) {
    const int64_t features = h.features, base = part.row * h.tokens;
    const T* weight = static_cast<const T*>(norm.weight);
    const bool loss = part.first < part.span_end && part.last > part.start + 1;
    const T* bos = loss ? h.at<T>(part.row, part.start) : nullptr;
    const double a_sq = loss ? square_sum(bos, features) : 0.0;
    if (part.dbos_part) std::fill(part.dbos_part, part.dbos_part + features, 0.0f);
    double total = 0.0;
    for (int64_t token = part.first; token < part.last; ++token) {
        const T* x = h.at<T>(part.row, token);
        T* __restrict out = static_cast<T*>(norm.out) + (base + token) * features;
        const bool counted = loss && token > part.start && token < part.span_end;
        // one loop for both, so that the loss changes no bit of out
        const Angle angle = angle_of(x, counted ? bos : x, features);
        if (counted) {
            const Term term = term_of(angle, a_sq, norm.margin);
            norm.scalars[2 * (base + token)] = term.w;
            norm.scalars[2 * (base + token) + 1] = term.p;
            if (term.w != 0.0) {
                total += term.value;
                add_dbos(x, bos, term, features, part.dbos_part);
            }
        }
        if (token >= part.start && token < part.end)
            largest_of(x, features, norm.max_abs + base + token, norm.feature + base + token);
        const float r = static_cast<float>(1.0 / std::sqrt(angle.h_sq / static_cast<double>(features) + norm.eps));
        norm.rstd[base + token] = r;
#pragma omp simd
        for (int64_t c = 0; c < features; ++c) {
            T normed;
            narrow(widen(x[c]) * r, &normed);
            narrow(widen(weight[c]) * widen(normed), out + c);
        }
    }
    return total;
}
FLASHSINK_DISPATCH(forward)

struct Gradient {
    const void *weight, *dout;
    const float* rstd;
    float dtotal;
    const double* scalars;  // null without a loss
    void* dh;
};

struct Slice {  // tokens [first, last) of a row, whose sequence begins at start
    int64_t row, first, last, start, span_end;
    const float* dbos;    // (C)
    float* dweight_part;  // (C), or null
};

struct Pull {  // what the loss adds to dh: along * bos - high * h - low * h
    float along, high, low;
};

FLASHSINK_INLINE Pull pull_of(const Gradient& gradient, const Slice& slice, int64_t index, int64_t token) {
    if (!gradient.scalars || token <= slice.start || token >= slice.span_end) return {0.0f, 0.0f, 0.0f};
    const double w = gradient.scalars[2 * index];
    if (w == 0.0) return {0.0f, 0.0f, 0.0f};
    const Pair p(gradient.scalars[2 * index + 1]);
    return {static_cast<float>(gradient.dtotal * w), p.high, p.low};
}

template <class T>
FLASHSINK_INLINE int backward_body(const Tokens& h, const Gradient& gradient, const Slice& slice) {
    const int64_t features = h.features;
    const T* weight = static_cast<const T*>(gradient.weight);
    if (slice.dweight_part) std::fill(slice.dweight_part, slice.dweight_part + features, 0.0f);
    for (int64_t token = slice.first; token < slice.last; ++token) {
        const int64_t index = slice.row * h.tokens + token;
        const T* x = h.at<T>(slice.row, token);
        const T* dout = static_cast<const T*>(gradient.dout) + index * features;
        T* __restrict dh = static_cast<T*>(gradient.dh) + index * features;
        double inner = 0.0;
        decltype(magnitude(T{})) some = 0;
#pragma omp simd reduction(+ : inner) reduction(| : some)
        for (int64_t c = 0; c < features; ++c) {
            inner += static_cast<double>(widen(weight[c]) * widen(dout[c])) * widen(x[c]);
            some |= magnitude(dout[c]);
        }
        const bool silent = some == 0;  // no gradient arrives: whatever padding holds must not get out
        const Pull pull = pull_of(gradient, slice, index, token);
        const float* dbos = gradient.scalars && token == slice.start && slice.span_end > slice.start + 1
                               ? slice.dbos
                               : nullptr;
        if (silent && pull.along == 0.0f && !dbos) {
            std::memset(static_cast<void*>(dh), 0, static_cast<size_t>(features) * sizeof(T));
            continue;
        }
        const float r = silent ? 0.0f : gradient.rstd[index];
        const double shrink = silent ? 0.0 : static_cast<double>(r) * r * r * inner / static_cast<double>(features);
        const float back = static_cast<float>(shrink);
        if (dbos) {
#pragma omp simd
            for (int64_t c = 0; c < features; ++c)
                narrow((r * (widen(weight[c]) * widen(dout[c])) - back * widen(x[c])) + gradient.dtotal * dbos[c],
                       dh + c);
        } else if (pull.along != 0.0f) {
            const T* a = h.at<T>(slice.row, slice.start);
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) {
                float y = widen(x[c]);
                float term = pull.along * ((widen(a[c]) - pull.high * y) - pull.low * y);
                narrow((r * (widen(weight[c]) * widen(dout[c])) - back * y) + term, dh + c);
            }
        } else {
#pragma omp simd
            for (int64_t c = 0; c < features; ++c)
                narrow(r * (widen(weight[c]) * widen(dout[c])) - back * widen(x[c]), dh + c);
        }
        if (slice.dweight_part && !silent) {
            float* __restrict sum = slice.dweight_part;
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) {
                T normed;
                narrow(widen(x[c]) * r, &normed);
                sum[c] += widen(dout[c]) * widen(normed);
            }
        }
    }
    return 0;
}
FLASHSINK_DISPATCH(backward)

// Every token in exactly one unit: padding goes with the sequence before it, or the first.
std::vector<Unit> all_tokens(const Tokens& h, const int64_t* starts, int64_t sequences, std::vector<int64_t>& begin) {
    std::vector<Unit> units;
    begin.assign(1, 0);
    for (int64_t n = 0; n < sequences; ++n) {
        const bool first = !h.packed || n == 0, last = !h.packed || n == sequences - 1;
        cut(units, n, first ? 0 : inside(starts[n], h.tokens), last ? h.tokens : inside(starts[n + 1], h.tokens));
        begin.push_back(static_cast<int64_t>(units.size()));
    }
    return units;
}

template <class T>
void forward_all(const Tokens& h, const Norm& norm, float* total, float* dbos, int threads) {
    std::vector<int64_t> begin;
    const std::vector<Unit> units = all_tokens(h, norm.starts, norm.sequences, begin);
    const int64_t count = static_cast<int64_t>(units.size()), features = h.features;
    std::vector<float> parts(static_cast<size_t>(norm.spans ? count * features : 0));
    std::vector<double> sums(units.size(), 0.0);
    parallel(count, h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t n = unit.sequence, start = inside(norm.starts[n], h.tokens), rest = h.tokens - start;
        const Part part{h.row_of(n), unit.first, unit.last, start, start + inside(norm.lengths[n], rest),
                        norm.spans ? start + inside(norm.spans[n], rest) : 0,
                        norm.spans ? parts.data() + index * features : nullptr};
        sums[index] = forward<T>(h, norm, part);
    });
    if (!norm.spans) return;
    for (int64_t n = 0; n < norm.sequences; ++n)
        add_up(parts.data() + begin[n] * features, begin[n + 1] - begin[n], features, dbos + n * features);
    double all = 0.0;
    for (double sum : sums) all += sum;
    *total = static_cast<float>(all);
}

template <class T>
void backward_all(const Tokens& h, const Gradient& gradient, const int64_t* starts, const int64_t* spans,
                  int64_t sequences, const float* dbos, float* dweight, int threads) {
    std::vector<int64_t> begin;
    const std::vector<Unit> units = all_tokens(h, starts, sequences, begin);
    const int64_t count = static_cast<int64_t>(units.size()), features = h.features;
    std::vector<float> parts(static_cast<size_t>(dweight ? count * features : 0));
    parallel(count, h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t n = unit.sequence, start = inside(starts[n], h.tokens);
        const Slice slice{h.row_of(n), unit.first, unit.last, start,
                          gradient.scalars ? start + inside(spans[n], h.tokens - start) : 0,
                          gradient.scalars ? dbos + n * features : nullptr,
                          dweight ? parts.data() + index * features : nullptr};
        backward<T>(h, gradient, slice);
    });
    if (dweight) add_up(parts.data(), count, features, dweight);
}

}  // namespace

// Both return 0, or 1 where memory is short. starts, lengths and spans are cut to the tokens there are; packed starts
// must not fall. spans null: no loss, and total, scalars and dbos are not touched. dweight null: not needed.
FLASHSINK_API int flashsink_rms_norm_forward(const void* h, int bf16, int64_t row_stride, int64_t token_stride,
                                             int64_t rows, int64_t tokens, int64_t features, const int64_t* starts,
                                             const int64_t* lengths, int64_t sequences, int packed,
                                             const int64_t* spans, const void* weight, double eps, double margin,
                                             void* out, float* total, float* max_abs, int32_t* feature, float* rstd,
                                             double* scalars, float* dbos, int threads) try {
    const Tokens view{h, row_stride, token_stride, rows, tokens, features, packed != 0};
    const Norm norm{weight, starts, lengths, spans, sequences, eps, margin, rstd, max_abs, feature, scalars, out};
    auto run = bf16 ? forward_all<Bf16> : forward_all<float>;
    run(view, norm, total, dbos, threads);
    return 0;
} catch (...) {
    return 1;
}

FLASHSINK_API int flashsink_rms_norm_backward(const void* h, int bf16, int64_t row_stride, int64_t token_stride,
                                              int64_t rows, int64_t tokens, int64_t features, const int64_t* starts,
                                              const int64_t* spans, int64_t sequences, int packed,
                                              const float* dtotal, const void* weight, const void* dout,
                                              const float* rstd, const double* scalars, const float* dbos,
                                              void* dh, float* dweight, int threads) try {
    const Tokens view{h, row_stride, token_stride, rows, tokens, features, packed != 0};
    const Gradient gradient{weight, dout, rstd, *dtotal, scalars, dh};
    auto run = bf16 ? backward_all<Bf16> : backward_all<float>;
    run(view, gradient, starts, spans, sequences, dbos, dweight, threads);
    return 0;
} catch (...) {
    return 1;
}
