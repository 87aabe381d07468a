// Column sums of a tile of attention probabilities: received[j] += sum over queries i of exp(scale * s[i, j] - lse[i]).
//
// The products s = q k^T come from a matrix multiplication elsewhere. A tile holds, for several rows of the batch and
// several query heads of each, those of queries [query, query + queries) with keys [key, key + keys), positions both.
// Shapes: s (rows, heads, queries, keys) contiguous, followed by kSlack readable floats; lse at its first query and
// received at its first key have a stride for rows and one for heads; starts, ends (rows) say which positions are
// valid, query_starts (rows) from which query on they count.
#include "exponential.h"

namespace {

using namespace flashsink;

constexpr int64_t kWide = 64, kNarrow = 16;  // keys that one visit of the queries sums up; kSlack = kWide

struct Tile {
    const float* s;
    const float* lse;
    float* received;
    int64_t rows, heads, queries, keys, query, key;
    int64_t lse_row, lse_head, received_row, received_head;
    const int64_t *starts, *ends, *query_starts;
    bool causal;
    float scale;
};

struct Column {  // keys [key, key + wide) of one head, offsets in the tile
    int64_t row, head, key;
};

template <int64_t Wide>
FLASHSINK_INLINE void column_body(const Tile& tile, const Column& column) {
    const int64_t start = tile.starts[column.row], end = tile.ends[column.row];
    const int64_t low = std::max<int64_t>({start, tile.query_starts[column.row], tile.query}) - tile.query;
    const int64_t high = std::min(end, tile.query + tile.queries) - tile.query;
    const int64_t first_key = tile.key + column.key;
    const int64_t from = std::max<int64_t>(start - first_key, 0);
    const int64_t to = std::min<int64_t>({end - first_key, Wide, tile.keys - column.key});
    if (from >= to || low >= high) return;
    const float* s =
        tile.s + ((column.row * tile.heads + column.head) * tile.queries) * tile.keys + column.key;
    const float* lse = tile.lse + column.row * tile.lse_row + column.head * tile.lse_head;
    // causal: the query at offset i sees the keys at offsets <= i + diagonal of this column
    const int64_t diagonal = tile.query - first_key;
    const int64_t begin = tile.causal ? std::max(low, -diagonal) : low;
    const int64_t full = tile.causal ? std::min(std::max(begin, Wide - 1 - diagonal), std::max(high, begin)) : begin;
    alignas(64) float sum[Wide] = {};
    const float scale = tile.scale;
    for (int64_t i = begin; i < std::min(full, high); ++i) {
        const float* s_i = s + i * tile.keys;
        const float lse_i = lse[i];
        const int32_t edge = static_cast<int32_t>(i + diagonal);
#pragma omp simd
        for (int32_t j = 0; j < static_cast<int32_t>(Wide); ++j) {
            const float a = exponential(s_i[j] * scale - lse_i);
            sum[j] += j <= edge ? a : 0.0f;
        }
    }
    for (int64_t i = full; i < high; ++i) {
        const float* s_i = s + i * tile.keys;
        const float lse_i = lse[i];
#pragma omp simd
        for (int64_t j = 0; j < Wide; ++j) sum[j] += exponential(s_i[j] * scale - lse_i);
    }
    float* out = tile.received + column.row * tile.received_row + column.head * tile.received_head + column.key;
    for (int64_t j = from; j < to; ++j) out[j] += sum[j];
}

// Keys [part * kPart, ...) of every head; the last ones in narrow columns.
template <class T>
FLASHSINK_INLINE int columns_body(const Tile& tile, const Column& column) {
    int64_t left = std::min(kWide, tile.keys - column.key);
    if (left > kWide - kNarrow) {
        column_body<kWide>(tile, column);
        return 0;
    }
    for (Column narrow = column; left > 0; left -= kNarrow, narrow.key += kNarrow) column_body<kNarrow>(tile, narrow);
    return 0;
}
FLASHSINK_DISPATCH(columns)

}  // namespace

// Adds to `received`. The same whatever the number of threads: each head and block of keys is one thread's.
FLASHSINK_API int flashsink_column_sums(const float* s, const float* lse, float* received, int64_t rows,
                                        int64_t heads, int64_t queries, int64_t keys, int64_t query, int64_t key,
                                        int64_t lse_row, int64_t lse_head, int64_t received_row,
                                        int64_t received_head, const int64_t* starts, const int64_t* ends,
                                        const int64_t* query_starts, int causal, float scale, int threads) {
    const Tile tile{s, lse, received, rows, heads, queries, keys, query, key, lse_row, lse_head, received_row,
                    received_head, starts, ends, query_starts, causal != 0, scale};
    const int64_t blocks = (keys + kWide - 1) / kWide;
    // one more thread for every 16,384 exponentials (about 10 us)
    const int64_t useful = 1 + rows * heads * queries * keys / 16384;
    parallel(rows * heads * blocks, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t index, int) {
        const int64_t block = index % blocks, pair = index / blocks;
        columns<float>(tile, Column{pair / heads, pair % heads, block * kWide});
    });
    return 0;
}
