// The element-wise part of attention's backward on a tile, whose matrix products are made elsewhere:
//   t = q k^T  ->  p = exp(scale * t - lse)          u = grad v^T  ->  scale * p * (u - delta)
// both in place, and 0 where a query does not see a key.
//
// Shapes: t, u (rows, heads, count, keys) adjacent; lse and delta have a stride for rows and one for heads; starts and
// ends (rows) say which positions are real. The queries are [query, query + count), the keys [key, key + keys).
#include "exponential.h"

namespace {

using namespace flashsink;

constexpr int64_t kQueries = 8;  // in one unit of work

struct Tile {
    float *products, *grads;
    const float *lse, *delta;
    int64_t rows, heads, count, keys, query, key, row_stride, head_stride;
    const int64_t *starts, *ends;
    bool causal;
    float scale;
};

struct Line {  // queries [first, last) of one head, offsets in the tile
    int64_t row, head, first, last;
};

template <class T>
FLASHSINK_INLINE int lines_body(const Tile& tile, const Line& line) {
    const int64_t start = tile.starts[line.row], end = tile.ends[line.row];
    const int64_t from = std::min(std::max<int64_t>(start - tile.key, 0), tile.keys);
    const int64_t offset = line.row * tile.row_stride + line.head * tile.head_stride;
    for (int64_t i = line.first; i < line.last; ++i) {
        const int64_t index = ((line.row * tile.heads + line.head) * tile.count + i) * tile.keys;
        const int64_t position = tile.query + i;
        const bool real = position >= start && position < end;
        const int64_t last = real ? (tile.causal ? position + 1 : end) - tile.key : 0;
        const int64_t to = std::max(from, std::min(last, tile.keys));
        T* __restrict p = tile.products + index;
        T* __restrict u = tile.grads + index;
        const T shift = tile.lse[offset + i], delta = tile.delta[offset + i], scale = tile.scale;
        std::fill(p, p + from, T(0));
        std::fill(u, u + from, T(0));
#pragma omp simd
        for (int64_t j = from; j < to; ++j) {
            const T a = exponential(p[j] * scale - shift);
            p[j] = a;
            u[j] = scale * a * (u[j] - delta);
        }
        std::fill(p + to, p + tile.keys, T(0));
        std::fill(u + to, u + tile.keys, T(0));
    }
    return 0;
}
FLASHSINK_DISPATCH(lines)

}  // namespace

FLASHSINK_API int flashsink_attention_tile(float* products, float* grads, const float* lse, const float* delta,
                                           int64_t rows, int64_t heads, int64_t count, int64_t keys, int64_t query,
                                           int64_t key, int64_t row_stride, int64_t head_stride,
                                           const int64_t* starts, const int64_t* ends, int causal, float scale,
                                           int threads) {
    const Tile tile{products, grads, lse, delta, rows, heads, count, keys, query, key, row_stride, head_stride,
                    starts, ends, causal != 0, scale};
    const int64_t blocks = (count + kQueries - 1) / kQueries;
    // one more thread for every 16,384 exponentials (about 10 us)
    const int64_t useful = 1 + rows * heads * count * keys / 16384;
    parallel(rows * heads * blocks, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t index, int) {
        const int64_t block = index % blocks, pair = index / blocks;
        lines<float>(tile, Line{pair / heads, pair % heads, block * kQueries,
                                std::min((block + 1) * kQueries, count)});
    });
    return 0;
}
