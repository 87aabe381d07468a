// The decorrelation loss of one layer: sum over sequences and tokens 1 <= s < span of max(cos^2(a, h) - margin, 0)
// with a = h at BOS, and its gradient.
//
// Shapes: h, dh (rows, tokens, C); starts, spans (sequences); scalars (rows, tokens, 2) = w, p of a counted token;
// dbos (sequences, C). w and p, and where they come from: rows.h. The forward adds up the gradient of BOS, so
// the backward needs nothing from other tokens and h is read once in each.
#include "rows.h"

namespace {

using namespace flashsink;

struct Chunk {  // forward over the counted tokens of one unit
    int64_t tokens, token_stride, features;
    double margin;
    double* scalars;   // (tokens, 2)
    float* dbos_part;  // (C), this unit's part of dbos
};

// Returns the unit's sum of max(cos^2 - margin, 0).
template <class T>
FLASHSINK_INLINE double forward_body(const Chunk& chunk, const T* const& bos, const T* const& first) {
    const int64_t features = chunk.features;
    const double a_sq = square_sum(bos, features);
    std::fill(chunk.dbos_part, chunk.dbos_part + features, 0.0f);
    double total = 0.0;
    for (int64_t s = 0; s < chunk.tokens; ++s) {
        const T* h = first + s * chunk.token_stride;
        const Term term = term_of(angle_of(h, bos, features), a_sq, chunk.margin);
        chunk.scalars[2 * s] = term.w;
        chunk.scalars[2 * s + 1] = term.p;
        if (term.w == 0.0) continue;
        total += term.value;
        add_dbos(h, bos, term, features, chunk.dbos_part);
    }
    return total;
}
FLASHSINK_DISPATCH(forward)

struct Slice {  // backward over the tokens [first, last) of a row, whose sequence begins at start
    int64_t row, first, last, start, span;
    float dsum;
    const double* scalars;  // (tokens, 2) of the row
    const float* dbos;      // (C) of the sequence
};

template <class T>
FLASHSINK_INLINE int backward_body(const Tokens& h, const Slice& slice, T* const& dh) {
    const int64_t features = h.features;
    const T* bos = h.at<T>(slice.row, slice.start);
    for (int64_t token = slice.first; token < slice.last; ++token) {
        T* __restrict out = dh + token * features;
        const bool counted = token > slice.start && token < slice.start + slice.span;
        const double w = counted ? slice.scalars[2 * token] : 0.0;
        if (token == slice.start && slice.span > 1) {
            const float* dbos = slice.dbos;
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) narrow(slice.dsum * dbos[c], out + c);
        } else if (w != 0.0) {
            const T* x = h.at<T>(slice.row, token);
            const Pair p(slice.scalars[2 * token + 1]);
            const float weight = static_cast<float>(slice.dsum * w);
#pragma omp simd
            for (int64_t c = 0; c < features; ++c) {
                float y = widen(x[c]), a = widen(bos[c]);
                narrow(weight * ((a - p.high * y) - p.low * y), out + c);
            }
        } else {
            std::memset(static_cast<void*>(out), 0, static_cast<size_t>(features) * sizeof(T));
        }
    }
    return 0;
}
FLASHSINK_DISPATCH(backward)

template <class T>
void forward_all(const Tokens& h, const int64_t* starts, const int64_t* spans, int64_t sequences, double margin,
                 float* total, double* scalars, float* dbos, int threads) {
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
        add_up(parts.data() + begin[n] * features, begin[n + 1] - begin[n], features, dbos + n * features);
    }
    double all = 0.0;
    for (double sum : sums) all += sum;
    *total = static_cast<float>(all);
}

template <class T>
void backward_all(const Tokens& h, const int64_t* starts, const int64_t* spans, int64_t sequences, float dsum,
                  const double* scalars, const float* dbos, void* dh, int threads) {
    // every token of dh is written by exactly one sequence: padding by the one before it, or the first
    std::vector<Unit> units;
    for (int64_t n = 0; n < sequences; ++n) {
        const bool first = !h.packed || n == 0, last = !h.packed || n == sequences - 1;
        cut(units, n, first ? 0 : inside(starts[n], h.tokens), last ? h.tokens : inside(starts[n + 1], h.tokens));
    }
    parallel(static_cast<int64_t>(units.size()), h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t row = h.row_of(unit.sequence), start = inside(starts[unit.sequence], h.tokens);
        Slice slice{row, unit.first, unit.last, start, inside(spans[unit.sequence], h.tokens - start), dsum,
                    scalars + 2 * row * h.tokens, dbos + unit.sequence * h.features};
        backward<T>(h, slice, static_cast<T*>(dh) + row * h.tokens * h.features);
    });
}

}  // namespace

// Both take the layers as tables of pointers and strides; results have the layer as first dimension (dh: a table).
// They return 0, or 1 where memory is short. starts and spans are cut to the tokens there are; packed starts must not
// fall.
FLASHSINK_API int flashsink_decorrelation_forward(const void* const* layers, const int64_t* row_strides,
                                                  const int64_t* token_strides, int64_t count, int bf16, int64_t rows,
                                                  int64_t tokens, int64_t features, const int64_t* starts,
                                                  const int64_t* spans, int64_t sequences, int packed, double margin,
                                                  float* totals, double* scalars, float* dbos,
                                                  int threads) try {
    auto run = bf16 ? forward_all<Bf16> : forward_all<float>;
    for (int64_t l = 0; l < count; ++l) {
        const Tokens view{layers[l], row_strides[l], token_strides[l], rows, tokens, features, packed != 0};
        run(view, starts, spans, sequences, margin, totals + l, scalars + l * rows * tokens * 2,
            dbos + l * sequences * features, threads);
    }
    return 0;
} catch (...) {
    return 1;
}

FLASHSINK_API int flashsink_decorrelation_backward(const void* const* layers, const int64_t* row_strides,
                                                   const int64_t* token_strides, int64_t count, int bf16,
                                                   int64_t rows, int64_t tokens, int64_t features,
                                                   const int64_t* starts, const int64_t* spans, int64_t sequences,
                                                   int packed, const float* dsum, const double* scalars,
                                                   const float* dbos, void* const* dlayers,
                                                   int threads) try {
    auto run = bf16 ? backward_all<Bf16> : backward_all<float>;
    for (int64_t l = 0; l < count; ++l) {
        const Tokens view{layers[l], row_strides[l], token_strides[l], rows, tokens, features, packed != 0};
        run(view, starts, spans, sequences, dsum[l], scalars + l * rows * tokens * 2,
            dbos + l * sequences * features, dlayers[l], threads);
    }
    return 0;
} catch (...) {
    return 1;
}
