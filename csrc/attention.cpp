// The element-wise part of attention's backward on a tile; its matrix products are made elsewhere:
//   s = q k^T  ->  p = exp(scale * s - lse)          dp = do v^T  ->  ds = scale * p * (dp - delta)
// both in place, and 0 where a query does not see a key (FlashAttention-2, Dao 2023).
//
// Shapes: s, dp (rows, heads, queries, keys) contiguous; lse and delta have a stride for rows and one for heads; starts
// and ends (rows) say which positions are valid. The queries are [query, query + queries), the keys [key, key + keys).
#include "exponential.h"

namespace {

using namespace flashsink;

constexpr int64_t kQueries = 8;  // in one unit of work

struct Tile {
    float *s, *dp;
    const float *lse, *delta;
    int64_t rows, heads, queries, keys, query, key, row_stride, head_stride;
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
        const int64_t index = ((line.row * tile.heads + line.head) * tile.queries + i) * tile.keys;
        const int64_t position = tile.query + i;
        const bool valid = position >= start && position < end;
        const int64_t last = valid ? (tile.causal ? position + 1 : end) - tile.key : 0;
        const int64_t to = std::max(from, std::min(last, tile.keys));
        T* __restrict p = tile.s + index;
        T* __restrict ds = tile.dp + index;
        const T lse = tile.lse[offset + i], delta = tile.delta[offset + i], scale = tile.scale;
        std::fill(p, p + from, T(0));
        std::fill(ds, ds + from, T(0));
#pragma omp simd
        for (int64_t j = from; j < to; ++j) {
            const T a = exponential(p[j] * scale - lse);
            p[j] = a;
            ds[j] = scale * a * (ds[j] - delta);
        }
        std::fill(p + to, p + tile.keys, T(0));
        std::fill(ds + to, ds + tile.keys, T(0));
    }
    return 0;
}
FLASHSINK_DISPATCH(lines)

}  // namespace

FLASHSINK_API int flashsink_attention_tile(float* s, float* dp, const float* lse, const float* delta,
                                           int64_t rows, int64_t heads, int64_t queries, int64_t keys, int64_t query,
                                           int64_t key, int64_t row_stride, int64_t head_stride,
                                           const int64_t* starts, const int64_t* ends, int causal, float scale,
                                           int threads) {
    const Tile tile{s, dp, lse, delta, rows, heads, queries, keys, query, key, row_stride, head_stride,
                    starts, ends, causal != 0, scale};
    const int64_t blocks = (queries + kQueries - 1) / kQueries;
    // one more thread for every 16,384 exponentials (about 10 us)
    const int64_t useful = 1 + rows * heads * queries * keys / 16384;
    parallel(rows * heads * blocks, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t index, int) {
        const int64_t block = index % blocks, pair = index / blocks;
        lines<float>(tile, Line{pair / heads, pair % heads, block * kQueries,
                                std::min((block + 1) * kQueries, queries)});
    });
    return 0;
}
