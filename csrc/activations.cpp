// Largest |h| of every valid token and the lowest feature that reaches it, for one layer.
//
// Shapes: h (rows, tokens, C); starts, lengths (sequences); max_abs float32 and feature int32 (rows, tokens), which
// come in filled with the values of padding.
#include "rows.h"

namespace {

using namespace flashsink;

struct Range {
    int64_t row, first, last;
    float* max_abs;    // (tokens) of the row
    int32_t* feature;  // (tokens) of the row
};

template <class T>
FLASHSINK_INLINE int largest_body(const Tokens& h, const Range& range) {
    for (int64_t token = range.first; token < range.last; ++token)
        largest_of(h.at<T>(range.row, token), h.features, range.max_abs + token, range.feature + token);
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
