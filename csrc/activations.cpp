// Largest |h| of every valid token and the lowest feature that reaches it, for one layer.
//
// Shapes: h (rows, tokens, C); starts, lengths (sequences); max_abs float32 and feature int32 (rows, tokens), which
// come in filled with the values of padding. Absolute values are compared as integers: the order is that of the
// numbers, infinity is above them and NaN above that, so nothing is lost and ties are exact.
#include "flashsink.h"

namespace {

using namespace flashsink;

constexpr int64_t kBlock = 64;  // features between two looks at the maximum so far

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

struct Range {
    int64_t row, first, last;
    float* max_abs;    // (tokens) of the row
    int32_t* feature;  // (tokens) of the row
};

template <class T>
FLASHSINK_INLINE int largest_body(const Tokens& h, const Range& range) {
    using Bits = decltype(magnitude(T{}));
    const int64_t features = h.features;
    for (int64_t token = range.first; token < range.last; ++token) {
        const T* x = h.at<T>(range.row, token);
        Bits top = -1;
        int64_t block = 0;
        for (int64_t base = 0; base < features; base += kBlock) {
            const int64_t end = std::min(base + kBlock, features);
            Bits here = 0;
#pragma omp simd reduction(max : here)
            for (int64_t c = base; c < end; ++c) here = std::max(here, magnitude(x[c]));
            if (here > top) {
                top = here;
                block = base;
            }
        }
        int64_t index = block;
        while (index < features && magnitude(x[index]) != top) ++index;
        const float value = value_of(std::max<Bits>(top, 0));
        range.max_abs[token] = value;
        // as the definition has it: no feature equals NaN
        range.feature[token] = static_cast<int32_t>(value == value ? index : features);
    }
    return 0;
}
FLASHSINK_DISPATCH(largest)

template <class T>
void largest_all(const Tokens& h, const int64_t* starts, const int64_t* lengths, int64_t sequences, float* max_abs,
                 int32_t* feature, int threads) {
    std::vector<Unit> units;
    for (int64_t n = 0; n < sequences; ++n) {
        const int64_t start = std::min(std::max<int64_t>(starts[n], 0), h.tokens);
        cut(units, n, start, start + std::min(std::max<int64_t>(lengths[n], 0), h.tokens - start));
    }
    parallel(static_cast<int64_t>(units.size()), h.workers(threads), [&](int64_t index, int) {
        const Unit& unit = units[index];
        const int64_t row = h.row_of(unit.sequence);
        largest<T>(h, Range{row, unit.first, unit.last, max_abs + row * h.tokens, feature + row * h.tokens});
    });
}

}  // namespace

// Returns 0, or 1 where memory is short. starts and lengths are cut to the tokens there are.
FLASHSINK_API int flashsink_activation_max(const void* h, int bf16, int64_t row_stride, int64_t token_stride,
                                           int64_t rows, int64_t tokens, int64_t features, const int64_t* starts,
                                           const int64_t* lengths, int64_t sequences, int packed, float* max_abs,
                                           int32_t* feature, int threads) try {
    const Tokens view{h, row_stride, token_stride, rows, tokens, features, packed != 0};
    auto run = bf16 ? largest_all<Bf16> : largest_all<float>;
    run(view, starts, lengths, sequences, max_abs, feature, threads);
    return 0;
} catch (...) {
    return 1;
}
