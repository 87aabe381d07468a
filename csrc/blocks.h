// What attention forward and backward share: their arguments, which keys a query sees, and the scores of a block of
// queries, which stay in one core's cache for everything that is done with them.
//
// A unit of work is a sequence and a head. Only tokens of sequences are read or written, and the results depend neither
// on the number of threads nor on how units are made.
#pragma once

#include <cmath>
#include <new>
#include <unordered_map>

#include "exponential.h"
#include "products.h"

namespace flashsink {

constexpr int64_t kBlock = 48;  // queries of a block; fewer read long rows of keys more often (bench/LOG.md)
constexpr int64_t kSlack = 16;  // floats behind a line of scores, for whole kLines of keys

enum Which { kQ, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv };  // of the tensors

// Tensors are float32 (rows, heads, tokens, D) with adjacent features, or (rows, heads, tokens), of any other strides.
// Window, chunk and softcap are 0, and pointers null, where there is none; flashsink.types.Pattern says what they mean.
// Positions are those of keys; the queries are the last ones of a row. Mirrored in cpu/attention.py.
struct Problem {
    void* const* data;       // of the tensors, q k v out lse [dout dq dk dv]
    const int64_t* strides;  // of rows, heads and tokens of each
    int64_t sequences, rows, heads, group, queries, keys, dim, dim_v;  // heads of k, query heads of each
    const int64_t *starts, *ends;                                      // (sequences)
    int64_t packed, causal, window, chunk;
    const int64_t *prefix, *blocks;  // (sequences) and (rows, keys)
    const uint8_t* mask;             // (rows or 1, queries, keys)
    int64_t mask_row;                // 0 where all rows have the same
    const float* sink_logits;        // (heads * group)
    const int32_t* targets;          // (lists, rows, queries), forward: the sum that a query adds to, or -1
    int64_t lists;
    float* received;  // (sums, rows, heads * group, keys)
    float* entropy;   // (rows, heads * group, queries)
    double scale, softcap;
    int64_t threads, apart;  // apart: dk and dv have a head for every query head

    FLASHSINK_INLINE int64_t hidden() const { return keys - queries; }  // positions before the first query
    FLASHSINK_INLINE int64_t row_of(int64_t sequence) const { return packed ? 0 : sequence; }
    FLASHSINK_INLINE float* at(int which, int64_t row, int64_t head, int64_t token) const {
        const int64_t* stride = strides + 3 * which;
        return static_cast<float*>(data[which]) + row * stride[0] + head * stride[1] + token * stride[2];
    }
    FLASHSINK_INLINE int64_t stride(int which) const { return strides[3 * which + 2]; }
    FLASHSINK_INLINE const uint8_t* mask_of(int64_t row, int64_t position) const {
        return mask + row * mask_row + (position - hidden()) * keys;
    }
};

struct Range {  // keys that a query sees, positions of a row
    int64_t low, high;              // none outside
    int64_t inner_low, inner_high;  // all inside
    FLASHSINK_INLINE bool empty() const { return low >= high; }
    FLASHSINK_INLINE bool checked() const { return inner_low != low || inner_high != high; }
};

// Where the tokens of a block of Pattern.blocks begin and end, by its number.
using Extents = std::unordered_map<int64_t, std::pair<int64_t, int64_t>>;

inline Range range_of(const Problem& problem, const Extents& extents, int64_t sequence, int64_t i) {
    const int64_t start = problem.starts[sequence], end = problem.ends[sequence], row = problem.row_of(sequence);
    int64_t low = start, high = end;
    if (problem.mask) {
        const uint8_t* seen = problem.mask_of(row, i);
        while (low < high && !seen[low]) ++low;
        while (high > low && !seen[high - 1]) --high;
        return {low, high, low, low};
    }
    if (problem.causal) high = i + 1;
    if (problem.window) {
        low = std::max(low, i - problem.window + 1);
        high = std::min(high, i + problem.window);
    }
    if (problem.chunk) {
        const int64_t first = start + (i - start) / problem.chunk * problem.chunk;
        low = std::max(low, first);
        high = std::min(high, first + problem.chunk);
    }
    if (problem.prefix && i < start + problem.prefix[sequence]) {  // both hold i, so their union is a range
        low = start;
        high = std::max(high, start + problem.prefix[sequence]);
    }
    const auto block = problem.blocks ? extents.find(problem.blocks[row * problem.keys + i]) : extents.end();
    if (block == extents.end()) return {low, high, low, high};
    return {std::min(low, block->second.first), std::max(high, block->second.second), low, high};
}

// Of all queries of a sequence.
inline std::vector<Range> ranges_of(const Problem& problem, int64_t sequence) {
    const int64_t start = problem.starts[sequence], end = problem.ends[sequence];
    Extents extents;
    for (int64_t j = start; problem.blocks && j < end; ++j) {
        const int64_t number = problem.blocks[problem.row_of(sequence) * problem.keys + j];
        if (number >= 0) extents.emplace(number, std::make_pair(j, j)).first->second.second = j + 1;
    }
    std::vector<Range> found;
    for (int64_t i = std::max(start, problem.hidden()); i < end; ++i)
        found.push_back(range_of(problem, extents, sequence, i));
    return found;
}

struct Work {  // one head of a sequence
    int64_t row, head, start, end;
    const Range* ranges;  // of its queries
};

struct Block {  // queries [query, query + count), the keys [base, base + width) of the sequence, whole panels
    int64_t query, count, base, width, stride;  // stride: between lines of scores
    const Range* ranges;
    int64_t low[kBlock / kLines], high[kBlock / kLines];  // what kLines queries see, from base on, whole panels

    FLASHSINK_INLINE int64_t lines() const { return up(count, kLines); }
};

FLASHSINK_INLINE Block block_of(const Problem& problem, const Work& work, int64_t query) {
    const int64_t first = std::max(work.start, problem.hidden());
    const int64_t count = std::min(kBlock, work.end - query);
    Block block{query, count, INT64_MAX, 0, 0, work.ranges + (query - first), {}, {}};
    int64_t high = 0;
    for (int64_t i = 0; i < count; i += kLines) {
        int64_t least = INT64_MAX, most = 0;
        for (int64_t r = i; r < std::min(i + kLines, count); ++r) {
            if (block.ranges[r].empty()) continue;
            least = std::min(least, block.ranges[r].low - work.start);
            most = std::max(most, block.ranges[r].high - work.start);
        }
        if (!most) continue;
        block.low[i / kLines] = least / kWide * kWide;
        block.high[i / kLines] = up(most, kWide);
        block.base = std::min(block.base, least / kWide * kWide);
        high = std::max(high, up(most, kWide));
    }
    block.width = std::max<int64_t>(high - block.base, 0);
    block.stride = block.width + kSlack;
    for (int64_t n = 0; n < up(count, kLines) / kLines; ++n) {
        block.low[n] = block.high[n] ? block.low[n] - block.base : 0;
        block.high[n] = block.high[n] ? block.high[n] - block.base : 0;
    }
    return block;
}

// to (block.lines(), features) = factor * the tensor's lines of the block's queries, then zeros.
FLASHSINK_INLINE void load(const Problem& problem, const Work& work, const Block& block, int which, int64_t features,
                           float factor, float* __restrict to) {
    for (int64_t i = 0; i < block.count; ++i) {
        const float* __restrict from = problem.at(which, work.row, work.head, block.query + i - problem.hidden());
        for (int64_t c = 0; c < features; ++c) to[i * features + c] = from[c] * factor;
    }
    std::fill(to + block.count * features, to + block.lines() * features, 0.0f);
}

// p (block.lines(), block.stride) = a b^T where a query of the same kLines sees a key: a (block.lines(), features), b
// the sequence's keys or values, turned.
template <class Registers>
FLASHSINK_INLINE void multiply_keys(const Block& block, const float* a, int64_t features, const float* b, float* p) {
    for (int64_t j = 0; j < block.width; j += kWide) {
        for (int64_t i = 0; i < block.count; i += kLines) {
            if (j >= block.low[i / kLines] && j < block.high[i / kLines])
                product<Registers, false, false>(a + i * features, features, b + (block.base + j) * features,
                                               p + i * block.stride + j, block.stride, features);
        }
    }
}

// c (block.lines(), columns) = p b, with b (columns / kWide, lines, kWide) in panels.
template <class Registers>
FLASHSINK_INLINE void multiply_panels(const Block& block, const float* p, const float* b, int64_t lines,
                                      int64_t columns, float* c) {
    for (int64_t panel = 0; panel < columns; panel += kWide) {
        for (int64_t i = 0; i < block.count; i += kLines) {
            const int64_t low = block.low[i / kLines];
            product<Registers, false, false>(p + i * block.stride + low, block.stride,
                                           b + panel * lines + (block.base + low) * kWide, c + i * columns + panel,
                                           columns, block.high[i / kLines] - low);
        }
    }
}

// Scores x, from products of q, which holds scale / softcap, to what the softmax takes: capped, -inf where hidden. `x`
// is the line of a query of the block, from block.base on.
FLASHSINK_INLINE void finish(const Problem& problem, const Work& work, const Block& block, int64_t query,
                             float* __restrict x) {
    const Range range = block.ranges[query];
    const int64_t first = work.start + block.base, low = range.low - first, high = range.high - first;
    if (problem.softcap > 0.0) {
        const float cap = static_cast<float>(problem.softcap);
#pragma omp simd
        for (int64_t j = low; j < high; ++j) x[j] = cap * hyperbolic_tangent(x[j]);
    }
    if (!range.checked()) return;
    const int64_t position = block.query + query;
    if (problem.mask) {
        const uint8_t* __restrict seen = problem.mask_of(work.row, position) + first;
        for (int64_t j = low; j < high; ++j) x[j] = seen[j] ? x[j] : -INFINITY;
        return;
    }
    const int64_t* numbers = problem.blocks + work.row * problem.keys;
    for (int64_t j = low; j < high; ++j) {
        const bool inner = first + j >= range.inner_low && first + j < range.inner_high;
        x[j] = inner || numbers[first + j] == numbers[position] ? x[j] : -INFINITY;
    }
}

FLASHSINK_INLINE float query_factor(const Problem& problem) {
    return static_cast<float>(problem.softcap > 0.0 ? problem.scale / problem.softcap : problem.scale);
}

// run(problem, work, query heads of it, memory) on all sequences and heads: those of a key head at once, or alone. 0,
// or 1 without memory. `products`: what is computed for a pair of tokens, `size`: how many floats a thread needs.
template <class Run>
int run_units(const Problem& problem, bool alone, int64_t products, int64_t (*size)(const Problem&, int64_t), Run run) {
    try {
        int64_t longest = 0, pairs = 0;
        std::vector<std::vector<Range>> ranges;
        for (int64_t n = 0; n < problem.sequences; ++n) {
            ranges.push_back(ranges_of(problem, n));
            longest = std::max(longest, problem.ends[n] - problem.starts[n]);
            pairs += static_cast<int64_t>(ranges.back().size()) * (problem.ends[n] - problem.starts[n]);
        }
        const int64_t group = alone ? 1 : problem.group;
        const int64_t heads = problem.heads * problem.group / group, units = problem.sequences * heads;
        // one more thread for every 2^18 multiplications (about 10 us)
        const int64_t useful = 1 + pairs * problem.heads * problem.group * problem.dim * products / (1 << 18);
        const int64_t workers = std::min<int64_t>({problem.threads, useful, std::max<int64_t>(units, 1)});
        const int64_t each = up(size(problem, longest), kWide);
        std::vector<float> memory(static_cast<size_t>(workers * each));
        parallel(units, static_cast<int>(workers), [&](int64_t index, int worker) {
            const int64_t n = index / heads;
            if (ranges[n].empty()) return;
            const int64_t head = index % heads * group;
            const Work work{problem.row_of(n), head, problem.starts[n], problem.ends[n], ranges[n].data()};
            run(problem, work, group, memory.data() + worker * each);
        });
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace flashsink
