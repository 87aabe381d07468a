// Attention forward, a block of queries at a time. Its probabilities are there whole between the product that makes
// them and the one with the values, so that column sums and the entropy cost an addition for each.
#include "blocks.h"

namespace {

using namespace flashsink;

struct Buffers {
    int64_t keys, dim_v;  // rounded up to panels
    float *k, *v, *q, *p, *out, *inverse;

    static void sizes(const Problem& problem, int64_t count, int64_t* to) {
        const int64_t keys = up(count, kWide), dim_v = up(problem.dim_v, kWide);
        const int64_t all[] = {keys * problem.dim, keys * dim_v, kBlock * problem.dim, kBlock * (keys + kSlack),
                               kBlock * dim_v, kBlock};
        for (int n = 0; n < 6; ++n) to[n] = up(all[n], kWide);
    }
    Buffers(const Problem& problem, int64_t count, float* memory)
        : keys(up(count, kWide)), dim_v(up(problem.dim_v, kWide)) {
        int64_t size[6];
        sizes(problem, count, size);
        float** const parts[] = {&k, &v, &q, &p, &out, &inverse};
        for (int n = 0; n < 6; memory += size[n++]) *parts[n] = memory;
    }
};

// Scores become exp(x - m), m their maximum, and 0 where kLines queries see something and this one does not.
FLASHSINK_INLINE void softmax(const Problem& problem, const Work& work, const Block& block, int64_t i,
                              float* __restrict p, float* inverse) {
    const int64_t from = block.low[i / kLines], to = block.high[i / kLines], first = work.start + block.base;
    *inverse = 0.0f;
    if (i >= block.count || block.ranges[i].empty()) {
        std::fill(p + from, p + to, 0.0f);
        return;
    }
    const int64_t low = block.ranges[i].low - first, high = block.ranges[i].high - first;
    finish(problem, work, block, i, p);
    const float sink = problem.sink_logits ? problem.sink_logits[work.head] : -INFINITY;
    float top = sink, own = 0.0f, below = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t j = low; j < high; ++j) top = p[j] > top ? p[j] : top;
#pragma omp simd reduction(+ : own, below)
    for (int64_t j = low; j < high; ++j) {
        const float x = p[j] - top, e = exponential(x);
        p[j] = e;
        own += e;
        below -= e == 0.0f ? 0.0f : e * x;
    }
    std::fill(p + from, p + low, 0.0f);
    std::fill(p + high, p + to, 0.0f);
    const float total = own + exponential(sink - top), logarithm = std::log(total);
    const int64_t query = block.query + i - problem.hidden();
    *problem.at(kLse, work.row, work.head, query) = top + logarithm;
    *inverse = 1.0f / total;
    // -sum of (e / l) log(e / l): two terms of one sign
    if (problem.entropy)
        problem.entropy[(work.row * problem.heads * problem.group + work.head) * problem.queries + query] =
            (own * logarithm + below) / total;
}

// Adds the probabilities of kLines queries from i on to the sums that they have as targets.
FLASHSINK_INLINE void add_columns(const Problem& problem, const Work& work, const Block& block, int64_t i,
                                  const float* p, const float* inverse) {
    const int64_t query = block.query + i - problem.hidden(), lines = std::min(kLines, block.count - i);
    const int64_t low = block.low[i / kLines], heads = problem.heads * problem.group;
    const int64_t key = work.start + block.base + low, some = std::min(block.high[i / kLines] - low, work.end - key);
    p += i * block.stride + low;
    for (int64_t list = 0; list < problem.lists; ++list) {
        const int32_t* target = problem.targets + (list * problem.rows + work.row) * problem.queries + query;
        for (int64_t r = 0; r < lines; ++r) {
            bool done = target[r] < 0;
            for (int64_t before = 0; before < r; ++before) done = done || target[before] == target[r];
            if (done) continue;
            float weight[kLines] = {};
            for (int64_t other = r; other < lines; ++other)
                weight[other] = target[other] == target[r] ? inverse[i + other] : 0.0f;
            float* __restrict sum =
                problem.received + ((target[r] * problem.rows + work.row) * heads + work.head) * problem.keys + key;
#pragma omp simd
            for (int64_t j = 0; j < some; ++j) {
                float column = 0.0f;
                for (int64_t other = 0; other < kLines; ++other) column += weight[other] * p[other * block.stride + j];
                sum[j] += column;
            }
        }
    }
}

template <class Registers>
FLASHSINK_INLINE void attend(const Problem& problem, const Work& work, const Buffers& buf, const Block& block) {
    if (!block.width) return;
    load(problem, work, block, kQ, problem.dim, query_factor(problem), buf.q);
    multiply_keys<Registers>(block, buf.q, problem.dim, buf.k, buf.p);
    for (int64_t i = 0; i < block.lines(); ++i)
        softmax(problem, work, block, i, buf.p + i * block.stride, buf.inverse + i);
    multiply_panels<Registers>(block, buf.p, buf.v, buf.keys, buf.dim_v, buf.out);
    for (int64_t i = 0; i < block.count; ++i) {
        if (block.ranges[i].empty()) continue;
        float* __restrict out = problem.at(kOut, work.row, work.head, block.query + i - problem.hidden());
        const float* __restrict sum = buf.out + i * buf.dim_v;
        const float inverse = buf.inverse[i];
        for (int64_t c = 0; c < problem.dim_v; ++c) out[c] = sum[c] * inverse;
    }
    for (int64_t i = 0; i < block.count; i += kLines) add_columns(problem, work, block, i, buf.p, buf.inverse);
}

template <class Registers>
FLASHSINK_INLINE void heads_body(const Problem& problem, Work work, int64_t heads, float* memory) {
    const int64_t count = work.end - work.start, head = work.head / problem.group;
    const Buffers buf(problem, count, memory);
    turn(problem.at(kK, work.row, head, work.start), problem.stride(kK), count, problem.dim, buf.k);
    lay(problem.at(kV, work.row, head, work.start), problem.stride(kV), count, problem.dim_v, buf.keys, buf.v);
    for (const int64_t last = work.head + heads; work.head < last; ++work.head) {
        for (int64_t query = std::max(work.start, problem.hidden()); query < work.end;) {
            const Block block = block_of(problem, work, query);
            attend<Registers>(problem, work, buf, block);
            query += block.count;
        }
    }
}
FLASHSINK_DISPATCH_VECTORS(heads)

int64_t memory_of(const Problem& problem, int64_t longest) {
    int64_t size[6], sum = 0;
    Buffers::sizes(problem, longest, size);
    for (int64_t one : size) sum += one;
    return sum;
}

}  // namespace

// Writes out, lse and entropy where a query sees something, and adds to received. 0, or 1 without memory.
FLASHSINK_API int flashsink_attention_forward(const Problem* problem) {
    // where key heads are too few for the threads, their query heads are units of their own
    const bool few = problem->sequences * problem->heads < 2 * problem->threads;
    return run_units(*problem, few, 1, memory_of, heads);
}
