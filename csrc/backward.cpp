// Attention backward, a block of queries at a time: with P = exp(x - lse), x the scores, and delta = rowsum(dO * O),
//   dv += P^T dO      dS = scale P * (dO v^T - delta), times 1 - tanh^2 where scores are capped
//   dq = dS k         dk += dS^T q                                                      (FlashAttention-2, Dao 2023)
#include "blocks.h"

namespace {

using namespace flashsink;

constexpr int kParts = 13;

struct Buffers {
    int64_t keys, dim, dim_v;  // rounded up to panels
    float *k, *k_turned, *v_turned, *dk, *dv;        // of the sequence
    float *q, *dout, *q_laid, *dout_laid, *p, *ds, *dq, *delta;  // of a block

    static void sizes(const Problem& problem, int64_t count, int64_t* to) {
        const int64_t keys = up(count, kWide), dim = up(problem.dim, kWide), dim_v = up(problem.dim_v, kWide);
        const int64_t more = keys + kLines;  // products of keys end with whole lines
        const int64_t all[kParts] = {keys * dim, keys * problem.dim, keys * problem.dim_v, more * dim, more * dim_v,
                                     kBlock * problem.dim, kBlock * problem.dim_v, kBlock * dim, kBlock * dim_v,
                                     kBlock * (keys + kSlack), kBlock * (keys + kSlack), kBlock * dim, kBlock};
        for (int n = 0; n < kParts; ++n) to[n] = up(all[n], kWide);
    }
    Buffers(const Problem& problem, int64_t count, float* memory)
        : keys(up(count, kWide)), dim(up(problem.dim, kWide)), dim_v(up(problem.dim_v, kWide)) {
        int64_t size[kParts];
        sizes(problem, count, size);
        float** const parts[kParts] = {&k, &k_turned, &v_turned, &dk, &dv, &q, &dout, &q_laid, &dout_laid, &p, &ds, &dq,
                                       &delta};
        for (int n = 0; n < kParts; memory += size[n++]) *parts[n] = memory;
    }
};

// Scores become P and products with dO become dS; 0 elsewhere.
FLASHSINK_INLINE void differentiate(const Problem& problem, const Work& work, const Block& block, int64_t i,
                                    float delta, float* __restrict p, float* __restrict ds) {
    if (i >= block.count || block.ranges[i].empty()) {
        std::fill(p, p + block.stride, 0.0f);
        std::fill(ds, ds + block.stride, 0.0f);
        return;
    }
    const int64_t first = work.start + block.base;
    const int64_t low = block.ranges[i].low - first, high = block.ranges[i].high - first;
    finish(problem, work, block, i, p);
    const float lse = *problem.at(kLse, work.row, work.head, block.query + i - problem.hidden());
    const float scale = static_cast<float>(problem.scale);
    if (problem.softcap > 0.0) {
        const float inverse = static_cast<float>(1.0 / problem.softcap);
#pragma omp simd
        for (int64_t j = low; j < high; ++j) {
            const float t = p[j] * inverse, a = exponential(p[j] - lse);
            p[j] = a;
            ds[j] = a == 0.0f ? 0.0f : scale * a * (ds[j] - delta) * (1.0f - t * t);
        }
    } else {
#pragma omp simd
        for (int64_t j = low; j < high; ++j) {
            const float a = exponential(p[j] - lse);
            p[j] = a;
            ds[j] = scale * a * (ds[j] - delta);
        }
    }
    for (float* line : {p, ds}) {
        std::fill(line, line + low, 0.0f);
        std::fill(line + high, line + block.stride, 0.0f);
    }
}

// sum (columns / kWide, lines, kWide) += p^T b, from the block's first key on: b (columns / kWide, kBlock, kWide).
template <class Registers>
FLASHSINK_INLINE void add_transposed(const Buffers& buf, const Block& block, const float* p, const float* b,
                                     int64_t columns, float* sum) {
    const int64_t lines = buf.keys + kLines;
    for (int64_t j = 0; j < block.width; j += kLines) {
        int64_t from = block.lines(), to = 0;  // queries that see one of these keys
        for (int64_t i = 0; i < block.count; i += kLines) {
            if (block.low[i / kLines] >= j + kLines || block.high[i / kLines] <= j) continue;
            from = std::min(from, i);
            to = i + kLines;
        }
        for (int64_t panel = 0; panel < columns && from < to; panel += kWide)
            product<Registers, true, true>(p + from * block.stride + j, block.stride, b + panel * kBlock + from * kWide,
                                         sum + panel * lines + (block.base + j) * kWide, kWide, to - from);
    }
}

template <class Registers>
FLASHSINK_INLINE void block_backward(const Problem& problem, const Work& work, const Buffers& buf, const Block& block) {
    if (!block.width) return;
    const int64_t dim = problem.dim, dim_v = problem.dim_v, query = block.query - problem.hidden();
    load(problem, work, block, kQ, dim, query_factor(problem), buf.q);
    load(problem, work, block, kDout, dim_v, 1.0f, buf.dout);
    lay(problem.at(kQ, work.row, work.head, query), problem.stride(kQ), block.count, dim, kBlock, buf.q_laid);
    lay(buf.dout, dim_v, block.count, dim_v, kBlock, buf.dout_laid);
    for (int64_t i = 0; i < block.count; ++i) {
        const float* __restrict out = problem.at(kOut, work.row, work.head, query + i);
        const float* __restrict dout = buf.dout + i * dim_v;
        float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
        for (int64_t c = 0; c < dim_v; ++c) delta += out[c] * dout[c];
        buf.delta[i] = delta;
    }
    multiply_keys<Registers>(block, buf.q, dim, buf.k_turned, buf.p);
    multiply_keys<Registers>(block, buf.dout, dim_v, buf.v_turned, buf.ds);
    for (int64_t i = 0; i < block.lines(); ++i)
        differentiate(problem, work, block, i, buf.delta[i], buf.p + i * block.stride, buf.ds + i * block.stride);
    add_transposed<Registers>(buf, block, buf.p, buf.dout_laid, buf.dim_v, buf.dv);
    add_transposed<Registers>(buf, block, buf.ds, buf.q_laid, buf.dim, buf.dk);
    multiply_panels<Registers>(block, buf.ds, buf.k, buf.keys, buf.dim, buf.dq);
    for (int64_t i = 0; i < block.count; ++i) {
        if (!block.ranges[i].empty())
            std::memcpy(problem.at(kDq, work.row, work.head, query + i), buf.dq + i * buf.dim, sizeof(float) * dim);
    }
}

// From panels (features / kWide, lines, kWide) to a tensor's lines.
FLASHSINK_INLINE void store(const Problem& problem, const Work& work, int which, int64_t head, const float* from,
                            int64_t lines, int64_t features) {
    for (int64_t c = 0; c < features; c += kWide, from += lines * kWide) {
        for (int64_t t = 0; t < work.end - work.start; ++t)
            std::memcpy(problem.at(which, work.row, head, work.start + t) + c, from + t * kWide,
                        sizeof(float) * std::min(kWide, features - c));
    }
}

template <class Registers>
FLASHSINK_INLINE void heads_body(const Problem& problem, Work work, int64_t heads, float* memory) {
    const int64_t count = work.end - work.start, head = work.head / problem.group;
    const Buffers buf(problem, count, memory);
    const float *k = problem.at(kK, work.row, head, work.start), *v = problem.at(kV, work.row, head, work.start);
    const int64_t lines = buf.keys + kLines;
    lay(k, problem.stride(kK), count, problem.dim, buf.keys, buf.k);
    turn(k, problem.stride(kK), count, problem.dim, buf.k_turned);
    turn(v, problem.stride(kV), count, problem.dim_v, buf.v_turned);
    std::fill(buf.dk, buf.dk + lines * buf.dim, 0.0f);
    std::fill(buf.dv, buf.dv + lines * buf.dim_v, 0.0f);
    for (const int64_t last = work.head + heads; work.head < last; ++work.head) {
        for (int64_t query = std::max(work.start, problem.hidden()); query < work.end;) {
            const Block block = block_of(problem, work, query);
            block_backward<Registers>(problem, work, buf, block);
            query += block.count;
        }
    }
    const int64_t own = problem.apart ? work.head - 1 : head;
    store(problem, work, kDk, own, buf.dk, lines, problem.dim);
    store(problem, work, kDv, own, buf.dv, lines, problem.dim_v);
}
FLASHSINK_DISPATCH_VECTORS(heads)

int64_t memory_of(const Problem& problem, int64_t longest) {
    int64_t size[kParts], sum = 0;
    Buffers::sizes(problem, longest, size);
    for (int64_t one : size) sum += one;
    return sum;
}

}  // namespace

// Writes dq, dk and dv at the tokens of sequences that have queries; those of a key head added up over its query heads
// or, `apart`, not. 0, or 1 without memory.
FLASHSINK_API int flashsink_attention_backward(const Problem* problem) {
    return run_units(*problem, problem->apart != 0, 3, memory_of, heads);
}
