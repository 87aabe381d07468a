// Attention of short sequences, whole: every pair of a sequence and a key head is one unit of work, whose queries,
// keys, values and probabilities stay in one core's cache. Forward, backward, and the column sums of the probabilities.
//
// Tensors are float32 (rows, heads, tokens, D) with adjacent features, or (rows, heads, tokens), of any other strides.
// Only tokens of sequences are read or written. In buffers tokens are rounded up to sixes (lines), keys and D to
// sixteens, padded with 0.
#include <cmath>

#include "exponential.h"

namespace {

using namespace flashsink;

constexpr int64_t kLines = 6, kWide = 16;  // of a product at once: twelve registers of AVX2, six of AVX-512
typedef float Vector __attribute__((vector_size(sizeof(float) * kWide)));

enum Task { kForward = 0, kBackward = 1, kStatistics = 2 };
enum Which { kQ, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv };  // of a problem's tensors
constexpr int kReceived = kV;  // the column sums take the place of v

struct Problem {
    void* const* data;
    const int64_t* strides;  // of rows, heads and tokens of every tensor
    int64_t sequences, heads, group, dim, longest;  // heads of k, query heads of each
    const int64_t *starts, *ends, *query_starts;
    bool packed, causal;
    float scale;

    FLASHSINK_INLINE float* at(int which, int64_t row, int64_t head, int64_t token) const {
        const int64_t* stride = strides + 3 * which;
        return static_cast<float*>(data[which]) + row * stride[0] + head * stride[1] + token * stride[2];
    }
};

FLASHSINK_INLINE int64_t up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Buffers {
    int64_t lines, keys, dim;
    float *q, *k, *kt, *v, *vt, *dout, *out, *p, *ds, *dk, *dv;

    // floats needed, with what a product may read and write past the last
    static int64_t size(int64_t longest, int64_t features) {
        const int64_t lines = up(longest, kLines) + kLines, keys = up(longest, kWide), dim = up(features, kWide);
        return 7 * lines * dim + 2 * keys * dim + 2 * lines * keys + kWide;
    }
    Buffers(float* memory, int64_t count, int64_t features)
        : lines(up(count, kLines)), keys(up(count, kWide)), dim(up(features, kWide)) {
        float** const wide[] = {&q, &k, &v, &dout, &out, &dk, &dv};
        for (float** part : wide) {
            *part = memory;
            memory += (lines + kLines) * dim;
        }
        for (float** part : {&kt, &vt}) {
            *part = memory;
            memory += keys * dim;
        }
        for (float** part : {&p, &ds}) {
            *part = memory;
            memory += (lines + kLines) * keys;
        }
    }
};

// What of a product is needed, with causal probabilities P: all; columns up to the line (P itself); factors up to the
// line (P on the left) or from it on (P transposed on the left).
enum Part { kAll, kColumnsTo, kFactorsTo, kFactorsFrom };

// c (lines, columns) = a b or c + a b; a (lines, factors) or transposed; b (factors, columns).
template <bool Transposed, bool Add>
FLASHSINK_INLINE void multiply(const float* a, int64_t a_stride, const float* b, float* c, int64_t columns,
                               int64_t lines, int64_t factors, Part part) {
    for (int64_t i = 0; i < lines; i += kLines) {
        const int64_t width = part == kColumnsTo ? std::min(columns, up(i + kLines, kWide)) : columns;
        const int64_t from = part == kFactorsFrom ? i : 0;
        const int64_t to = part == kFactorsTo ? std::min(factors, i + kLines) : factors;
        for (int64_t j = 0; j < width; j += kWide) {
            Vector sum[kLines];
            for (int64_t r = 0; r < kLines; ++r) {
                if (Add) std::memcpy(&sum[r], c + (i + r) * columns + j, sizeof(Vector));
                else sum[r] = Vector{};
            }
            for (int64_t x = from; x < to; ++x) {
                Vector line;
                std::memcpy(&line, b + x * columns + j, sizeof line);
#pragma GCC unroll 6
                for (int64_t r = 0; r < kLines; ++r)
                    sum[r] += line * (Transposed ? a[x * a_stride + i + r] : a[(i + r) * a_stride + x]);
            }
            for (int64_t r = 0; r < kLines; ++r) std::memcpy(c + (i + r) * columns + j, &sum[r], sizeof(Vector));
        }
    }
}

FLASHSINK_INLINE void load(const float* from, int64_t stride, int64_t count, int64_t features, int64_t lines,
                           int64_t dim, float* to) {
    for (int64_t t = 0; t < count; ++t) {
        std::memcpy(to + t * dim, from + t * stride, sizeof(float) * features);
        std::fill(to + t * dim + features, to + (t + 1) * dim, 0.0f);
    }
    std::fill(to + count * dim, to + lines * dim, 0.0f);
}

FLASHSINK_INLINE void store(const float* from, int64_t dim, int64_t count, int64_t features, float* to,
                            int64_t stride) {
    for (int64_t t = 0; t < count; ++t) std::memcpy(to + t * stride, from + t * dim, sizeof(float) * features);
}

// (count, dim) -> (features, keys)
FLASHSINK_INLINE void turn(const float* from, int64_t count, int64_t dim, int64_t features, int64_t keys, float* to) {
    for (int64_t c = 0; c < features; ++c) {
        for (int64_t t = 0; t < count; ++t) to[c * keys + t] = from[t * dim + c];
        std::fill(to + c * keys + count, to + (c + 1) * keys, 0.0f);
    }
}

struct Unit {  // one sequence and key head
    int64_t row, head, start, count, query_start;
};

// p (count, keys) = exp(scale q k^T - lse), 0 where a query sees no key
FLASHSINK_INLINE void probabilities(const Problem& problem, const Buffers& buf, int64_t count, const float* lse) {
    const int64_t stride = problem.strides[3 * kLse + 2];
    for (int64_t i = 0; i < count; ++i) {
        float* __restrict p = buf.p + i * buf.keys;
        const int64_t seen = problem.causal ? i + 1 : count;
        const float lse_i = lse[i * stride], scale = problem.scale;
#pragma omp simd
        for (int64_t j = 0; j < seen; ++j) p[j] = exponential(p[j] * scale - lse_i);
        std::fill(p + seen, p + buf.keys, 0.0f);
    }
}

// p = exp(scale q k^T - m_i) with m_i its row maximum and l_i its row sum; writes lse = m_i + log(l_i) and 1 / l_i
FLASHSINK_INLINE void softmax(const Problem& problem, const Buffers& buf, int64_t count, float* lse,
                              float* __restrict inverse_l) {
    const int64_t stride = problem.strides[3 * kLse + 2];
    for (int64_t i = 0; i < count; ++i) {
        float* __restrict p = buf.p + i * buf.keys;
        const int64_t seen = problem.causal ? i + 1 : count;
        float m_i = -INFINITY, l_i = 0.0f;
#pragma omp simd reduction(max : m_i)
        for (int64_t j = 0; j < seen; ++j) {
            p[j] *= problem.scale;
            m_i = p[j] > m_i ? p[j] : m_i;
        }
#pragma omp simd reduction(+ : l_i)
        for (int64_t j = 0; j < seen; ++j) {
            p[j] = exponential(p[j] - m_i);
            l_i += p[j];
        }
        std::fill(p + seen, p + buf.keys, 0.0f);
        lse[i * stride] = m_i + std::log(l_i);
        inverse_l[i] = 1.0f / l_i;
    }
}

FLASHSINK_INLINE void scores(const Problem& problem, const Buffers& buf, const Unit& unit, int64_t head) {
    const int64_t stride = problem.strides[3 * kQ + 2];
    load(problem.at(kQ, unit.row, head, unit.start), stride, unit.count, problem.dim, buf.lines, buf.dim, buf.q);
    multiply<false, false>(buf.q, buf.dim, buf.kt, buf.p, buf.keys, buf.lines, problem.dim,
                           problem.causal ? kColumnsTo : kAll);
}

FLASHSINK_INLINE void forward(const Problem& problem, const Buffers& buf, const Unit& unit, int64_t head) {
    float* const inverse_l = buf.ds;
    scores(problem, buf, unit, head);
    softmax(problem, buf, unit.count, problem.at(kLse, unit.row, head, unit.start), inverse_l);
    multiply<false, false>(buf.p, buf.keys, buf.v, buf.out, buf.dim, buf.lines, unit.count,
                           problem.causal ? kFactorsTo : kAll);
    for (int64_t i = 0; i < unit.count; ++i) {
        float* __restrict out = problem.at(kOut, unit.row, head, unit.start + i);
        const float* __restrict acc = buf.out + i * buf.dim;
        for (int64_t c = 0; c < problem.dim; ++c) out[c] = acc[c] * inverse_l[i];
    }
}

// With dP = dO v^T, delta = rowsum(dO * O) and dS = scale P * (dP - delta): dv += P^T dO, dk += dS^T q, dq = dS k.
FLASHSINK_INLINE void backward(const Problem& problem, const Buffers& buf, const Unit& unit, int64_t head) {
    const bool causal = problem.causal;
    const int64_t dim = buf.dim, keys = buf.keys, lines = buf.lines, count = unit.count;
    scores(problem, buf, unit, head);
    probabilities(problem, buf, count, problem.at(kLse, unit.row, head, unit.start));
    load(problem.at(kDout, unit.row, head, unit.start), problem.strides[3 * kDout + 2], count, problem.dim, lines, dim,
         buf.dout);
    multiply<false, false>(buf.dout, dim, buf.vt, buf.ds, keys, lines, problem.dim, causal ? kColumnsTo : kAll);
    multiply<true, true>(buf.p, keys, buf.dout, buf.dv, dim, lines, count, causal ? kFactorsFrom : kAll);
    for (int64_t i = 0; i < count; ++i) {
        const float* out = problem.at(kOut, unit.row, head, unit.start + i);
        const float* dout = buf.dout + i * dim;
        const float* p = buf.p + i * keys;
        float* __restrict ds = buf.ds + i * keys;
        const int64_t seen = causal ? i + 1 : count;
        const float scale = problem.scale;
        float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
        for (int64_t c = 0; c < problem.dim; ++c) delta += out[c] * dout[c];
#pragma omp simd
        for (int64_t j = 0; j < seen; ++j) ds[j] = scale * p[j] * (ds[j] - delta);
        std::fill(ds + seen, ds + keys, 0.0f);
    }
    multiply<true, true>(buf.ds, keys, buf.q, buf.dk, dim, lines, count, causal ? kFactorsFrom : kAll);
    multiply<false, false>(buf.ds, keys, buf.k, buf.out, dim, lines, count, causal ? kFactorsTo : kAll);
    store(buf.out, dim, count, problem.dim, problem.at(kDq, unit.row, head, unit.start),
          problem.strides[3 * kDq + 2]);
}

FLASHSINK_INLINE void statistics(const Problem& problem, const Buffers& buf, const Unit& unit, int64_t head) {
    scores(problem, buf, unit, head);
    probabilities(problem, buf, unit.count, problem.at(kLse, unit.row, head, unit.start));
    float* __restrict received = buf.ds;
    std::fill(received, received + buf.keys, 0.0f);
    for (int64_t i = unit.query_start; i < unit.count; ++i) {
        const float* __restrict p = buf.p + i * buf.keys;
#pragma omp simd
        for (int64_t j = 0; j < buf.keys; ++j) received[j] += p[j];
    }
    for (int64_t j = 0; j < unit.count; ++j) *problem.at(kReceived, unit.row, head, unit.start + j) = received[j];
}

template <class T>
FLASHSINK_INLINE int unit_body(const Problem& problem, const Task& task, int64_t index, T* memory) {
    const int64_t n = index / problem.heads, head = index % problem.heads;
    const Unit unit{problem.packed ? 0 : n, head, problem.starts[n], problem.ends[n] - problem.starts[n],
                    std::max<int64_t>(problem.query_starts[n] - problem.starts[n], 0)};
    if (unit.count <= 0) return 0;
    const Buffers buf(memory, unit.count, problem.dim);
    const int64_t* strides = problem.strides;
    load(problem.at(kK, unit.row, head, unit.start), strides[3 * kK + 2], unit.count, problem.dim, buf.lines, buf.dim,
         buf.k);
    turn(buf.k, unit.count, buf.dim, problem.dim, buf.keys, buf.kt);
    if (task != kStatistics)
        load(problem.at(kV, unit.row, head, unit.start), strides[3 * kV + 2], unit.count, problem.dim, buf.lines,
             buf.dim, buf.v);
    if (task == kBackward) {
        turn(buf.v, unit.count, buf.dim, problem.dim, buf.keys, buf.vt);
        std::fill(buf.dk, buf.dk + buf.lines * buf.dim, 0.0f);
        std::fill(buf.dv, buf.dv + buf.lines * buf.dim, 0.0f);
    }
    for (int64_t h = head * problem.group; h < (head + 1) * problem.group; ++h) {
        if (task == kForward) forward(problem, buf, unit, h);
        else if (task == kBackward) backward(problem, buf, unit, h);
        else statistics(problem, buf, unit, h);
    }
    if (task == kBackward) {
        store(buf.dk, buf.dim, unit.count, problem.dim, problem.at(kDk, unit.row, head, unit.start),
              strides[3 * kDk + 2]);
        store(buf.dv, buf.dim, unit.count, problem.dim, problem.at(kDv, unit.row, head, unit.start),
              strides[3 * kDv + 2]);
    }
    return 0;
}
FLASHSINK_DISPATCH(unit)

}  // namespace

// `data` and `strides` (three each) by task: q k v out lse; q k v out lse dout dq dk dv; q k received - lse. Sequence n
// is [starts[n], ends[n]), no longer than `longest`, of row n or of the packed row 0; in received only queries from
// query_starts[n] on count. The result does not depend on the number of threads. Returns 0, or 1 without memory.
FLASHSINK_API int flashsink_short_attention(int task, void* const* data, const int64_t* strides, int64_t sequences,
                                            int64_t heads, int64_t group, int64_t dim, int64_t longest,
                                            const int64_t* starts, const int64_t* ends, const int64_t* query_starts,
                                            int packed, int causal, float scale, int threads) {
    const Problem problem{data, strides, sequences, heads, group, dim, longest, starts, ends, query_starts,
                          packed != 0, causal != 0, scale};
    const int64_t units = sequences * heads;
    // one more thread for every 2^18 multiplications (about 10 us)
    const int64_t useful = 1 + units * group * longest * longest * dim / (1 << 18);
    const int workers = static_cast<int>(std::min<int64_t>({threads, useful, std::max<int64_t>(units, 1)}));
    const int64_t size = up(Buffers::size(longest, dim), kWide);
    std::vector<float> memory;
    try {
        memory.resize(static_cast<size_t>(workers * size));
    } catch (...) {
        return 1;
    }
    parallel(units, workers, [&](int64_t index, int worker) {
        unit<float>(problem, static_cast<Task>(task), index, memory.data() + worker * size);
    });
    return 0;
}
