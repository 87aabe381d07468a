"""The definitions of the design in float64, in loops over rows and queries or tokens; shares nothing with flashsink.

Everything is differentiable (torch float64), so gradients come from autograd. Dimensions: B rows, H query and Hk
key heads, Sq queries, Sk keys, D head dim, L layers, S tokens, C features.
"""

from __future__ import annotations

import math

import torch


def runs(rows, tokens, lengths=None, starts=None, cu_seqlens=None):
    """Per row the list of (first, end) of its sequences; dense rows have one."""
    if cu_seqlens is not None:
        bounds = [int(x) for x in cu_seqlens]
        return [list(zip(bounds[:-1], bounds[1:], strict=True))]
    first = [0] * rows if starts is None else [int(x) for x in starts]
    count = [tokens - f for f in first] if lengths is None else [int(x) for x in lengths]
    return [[(f, f + n)] for f, n in zip(first, count, strict=True)]


def keys_of(row_runs, position, causal):
    """The keys that the query at ``position`` may see; none for padding."""
    for first, end in row_runs:
        if first <= position < end:
            return list(range(first, position + 1 if causal else end))
    return []


class Pattern:
    """Which of the keys of its row or sequence a query sees, pair by pair."""

    def __init__(self, causal, window=None, chunk=None, prefix=None, blocks=None, mask=None):
        self.causal, self.window, self.chunk = causal, window, chunk
        self.prefix, self.blocks, self.mask = prefix, blocks, mask

    def sees(self, b, number, first, i, j, query):
        """Whether position i sees j: ``number`` is that of their sequence, which begins at ``first``, and ``query``
        that of i among the queries."""
        if self.mask is not None:
            return bool(self.mask[b if len(self.mask) > 1 else 0, 0, query, j])
        if self.prefix is not None and max(i, j) < first + int(self.prefix[number]):
            return True
        if self.blocks is not None and int(self.blocks[b, i]) == int(self.blocks[b, j]) >= 0:
            return True
        if self.causal and j > i:
            return False
        if self.window is not None and abs(i - j) >= self.window:
            return False
        return self.chunk is None or (i - first) // self.chunk == (j - first) // self.chunk

    def keys(self, rows, b, position, query):
        """The keys that the query at ``position`` of row b sees; none for padding."""
        for n, (first, end) in enumerate(rows[b]):
            if first <= position < end:
                number = n if len(rows[b]) > 1 else b  # of all sequences, or of dense rows
                return [j for j in range(first, end) if self.sees(b, number, first, position, j, query)]
        return []


class Attention:
    """out (B,H,Sq,Dv), probs (B,H,Sq,Sk), received and mean_received (B,H,Sk), queries (B,Sk), lse (B,H,Sq).

    ``sink_logits`` (H,) are one more term in every row's softmax, without a value; ``softcap`` c makes the scores
    c tanh(scores / c); ``pattern`` are the arguments of :class:`Pattern`.
    """

    def __init__(
        self,
        q,
        k,
        v,
        *,
        lengths=None,
        starts=None,
        cu_seqlens=None,
        causal=True,
        scale=None,
        query_starts=None,
        sink_logits=None,
        softcap=None,
        **pattern,
    ):
        q, k, v = q.double(), k.double(), v.double()
        b_, h_, sq, d = q.shape
        sk = k.shape[2]
        k, v = (x.repeat_interleave(h_ // k.shape[1], dim=1) for x in (k, v))
        scale = 1.0 / math.sqrt(d) if scale is None else scale
        rows = runs(b_, sk, lengths, starts, cu_seqlens)
        pattern = Pattern(causal, **pattern)
        nothing = torch.zeros(h_, v.shape[3], dtype=torch.float64)
        out = [[nothing] * sq for _ in range(b_)]
        self.probs = torch.zeros(b_, h_, sq, sk, dtype=torch.float64)
        self.lse = torch.zeros(b_, h_, sq, dtype=torch.float64)
        self.queries = torch.zeros(b_, sk, dtype=torch.long)
        self.received = torch.zeros(b_, h_, sk, dtype=torch.float64)
        for b in range(b_):
            for i in range(sq):
                position = sk - sq + i
                keys = pattern.keys(rows, b, position, i)
                if not keys:
                    continue
                scores = (k[b, :, keys] * q[b, :, i, None]).sum(-1) * scale  # (H, keys)
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                top = scores.detach().amax(-1, keepdim=True)
                if sink_logits is not None:
                    top = torch.maximum(top, sink_logits.detach().double()[:, None])
                e = (scores - top).exp()
                total = e.sum(-1, keepdim=True)
                if sink_logits is not None:
                    total = total + (sink_logits.double()[:, None] - top).exp()
                p = e / total
                out[b][i] = (p[..., None] * v[b, :, keys]).sum(1)
                self.probs[b, :, i, keys] = p.detach()
                self.lse[b, :, i] = (top + total.detach().log()).squeeze(-1)
                if query_starts is None or position >= int(query_starts[b]):
                    self.queries[b, keys] += 1
                    self.received[b, :, keys] += p.detach()
        self.out = torch.stack([torch.stack(row, dim=1) for row in out])
        self.mean_received = self.received / self.queries.clamp(min=1)[:, None]

    def by_segment(self, ids, count, rows, query_starts=None):
        """(received (B,H,n,Sk), mass (N,H,n,n), queries (N,n), entropy (B,H,Sq)), token by token; ``rows`` as of
        :func:`runs`."""
        b_, h_, sq, sk = self.probs.shape
        sequences = [(b, first, end) for b in range(b_) for first, end in rows[b]]
        received = torch.zeros(b_, h_, count, sk, dtype=torch.float64)
        mass = torch.zeros(len(sequences), h_, count, count, dtype=torch.float64)
        queries = torch.zeros(len(sequences), count, dtype=torch.long)
        entropy = torch.zeros(b_, h_, sq, dtype=torch.float64)
        for n, (b, first, end) in enumerate(sequences):
            for i in range(max(first, sk - sq), end):
                p = self.probs[b, :, i - sk + sq]
                entropy[b, :, i - sk + sq] = -torch.where(p > 0.0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)
                own = int(ids[b, i])
                if own < 0 or (query_starts is not None and i < int(query_starts[b])):
                    continue
                queries[n, own] += 1
                received[b, :, own] += p
                for j in range(first, end):
                    if int(ids[b, j]) >= 0:
                        mass[n, :, own, int(ids[b, j])] += p[:, j]
        return received, mass, queries, entropy

    def sink_rate(self, eps=0.3, min_queries=1):
        b_, h_, sk = self.received.shape
        rate = torch.zeros(b_, sk, dtype=torch.float64)
        for b in range(b_):
            for j in range(sk):
                if self.queries[b, j] >= max(min_queries, 1):
                    rate[b, j] = sum(float(self.mean_received[b, h, j]) > eps for h in range(h_)) / h_
        return rate


def plain_attention(q, k, v, mask, scale=None):
    """What a user writes in PyTorch, in the dtype of the inputs; ``mask`` (B,1,Sq,Sk) bool."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0) @ v


def act(probs, sinks, rows, beta):
    """The literal algorithm of ACT on (B,H,Sq,Sk) probabilities, row by row; float64 with its graph."""
    b_, h_, sq, sk = probs.shape
    result = []
    for b in range(b_):
        for h in range(h_):
            for i in range(sq):
                row = list(probs[b, h, i].double())
                own = keys_of(rows[b], sk - sq + i, False)  # those that are not seen have no mass
                columns = [j for j in own if bool(sinks[b, h, j]) and j != own[0]]
                others = [j for j in own if j not in columns]
                total = sum(row[j] for j in others)
                if columns and bool(total.detach() > 0.0):
                    freed = sum(row[j] for j in columns) * (1.0 - beta)
                    for j in columns:
                        row[j] = row[j] * beta
                    for j in others:
                        row[j] = row[j] + freed * row[j] / total
                result.append(torch.stack(row))
    return torch.stack(result).view(b_, h_, sq, sk)


def weigh(probs, v):
    """(B,H,Sq,D) float64."""
    b_, h_, sq, sk = probs.shape
    out = torch.zeros(b_, h_, sq, v.shape[-1], dtype=torch.float64)
    for b in range(b_):
        for h in range(h_):
            g = h // (h_ // v.shape[1])
            for i in range(sq):
                for j in range(sk):
                    out[b, h, i] += probs[b, h, i, j] * v[b, g, j].double()
    return out


def norm(x):
    """The Euclidean norm, at least 1e-12 as in torch.nn.functional.normalize."""
    return (x * x).sum().sqrt().clamp(min=1e-12)


def decorrelation(layers, spans, *, margin=0.0, starts=None, cu_seqlens=None):
    """Definition 4, token by token; float64 with its graph."""
    layers = [layer.double() for layer in layers]
    b_, s_, _ = layers[0].shape
    rows = runs(b_, s_, None, starts, cu_seqlens)
    sequences = [(b, first) for b in range(b_) for first, _ in rows[b]]
    count = sum(max(int(n) - 1, 0) for n in spans)
    per_layer = []
    for layer in layers:
        total = (layer[:0] * 0.0).sum()
        for (b, first), span in zip(sequences, spans, strict=True):
            for s in range(1, int(span)):
                a, h = layer[b, first], layer[b, first + s]
                if not bool(a.detach().any()) or not bool(h.detach().any()):
                    continue  # the cosine with a zero vector is 0
                cos = (a * h).sum() / (norm(a) * norm(h))
                total = total + torch.relu(cos * cos - margin)
        per_layer.append(total)
    if count == 0:
        return sum(per_layer) * 0.0
    return sum(per_layer) / len(per_layer) / count


def activations(layers, lengths=None, starts=None):
    """max_abs, feature (L,B,S) and median (L,B) as nested lists, float64."""
    top, feature, median = [], [], []
    for layer in layers:
        layer = layer.detach().double()
        b_, s_, _ = layer.shape
        rows = runs(b_, s_, lengths, starts)
        top.append([[0.0] * s_ for _ in range(b_)])
        feature.append([[-1] * s_ for _ in range(b_)])
        median.append([0.0] * b_)
        for b in range(b_):
            everything = []
            for s in range(*rows[b][0]):
                sizes = layer[b, s].abs().tolist()
                everything += sizes
                top[-1][b][s] = max(sizes)
                feature[-1][b][s] = sizes.index(max(sizes))
            if everything:
                median[-1][b] = sorted(everything)[(len(everything) - 1) // 2]
    return top, feature, median


def rms_norm(h, weight, eps):
    """RMSNorm (B,S,C) in float64 with its graph."""
    h = h.double()
    return weight.double() * h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
