// What the threads of a warp exchange: shuffles, votes, reductions.
#include <algorithm>
#include <cmath>
#include <limits>

#include "machine.h"

namespace ptx {

void whole_warps(Machine& m, const Instruction& i) {
  for (int w = 0; w < m.warps; ++w)
    for (int t = 32 * w; t < 32 * w + 32; ++t)
      if (m.active(t) != m.active(32 * w)) m.fault(i, "threads of a warp are missing");
  const std::string& base = i.parts[0];
  if (base != "shfl" && base != "redux" && base != "vote") return;
  const uint32_t* members = m.at<uint32_t>(i.args.back());
  for (int t = 0; t < m.threads; ++t)
    if (m.active(t) && members[t] != ~0u) m.fault(i, "not emulated: a part of a warp");
}

namespace {

void shuffle(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const bool paired = i.args.size() == 6;  // with a predicate: whether the source is in range
  const size_t at = paired ? 2 : 1;
  const uint32_t* from = m.at<uint32_t>(i.args[at]);
  const std::vector<uint32_t> a(from, from + m.threads);
  const uint32_t *b = m.at<uint32_t>(i.args[at + 1]), *c = m.at<uint32_t>(i.args[at + 2]);
  const std::string& mode = i.parts[2];
  uint32_t* d = m.at<uint32_t>(i.args[0]);
  bool* ok = paired ? m.at<bool>(i.args[1]) : nullptr;
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    int lane = t & 31, clamp = int(c[t] & 31), segment = int(c[t] >> 8 & 31), n = int(b[t] & 31);
    int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
    int source = mode == "bfly" ? lane ^ n : mode == "up" ? lane - n : lane + n;
    if (mode == "idx") source = least | (n & ~segment);
    bool inside = mode == "up" ? source >= most : source <= most;
    d[t] = a[size_t((t & ~31) + (inside ? source : lane))];
    if (ok) ok[t] = inside;
  }
}

void vote(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const bool* p = m.at<bool>(i.args[1]);
  for (int w = 0; w < m.warps; ++w) {
    uint32_t set = 0;
    for (int t = 0; t < 32; ++t) set |= uint32_t(p[32 * w + t]) << t;
    for (int t = 32 * w; t < 32 * w + 32; ++t) {
      if (!m.active(t)) continue;
      if (i.has("ballot")) m.at<uint32_t>(i.args[0])[t] = set;
      else m.at<bool>(i.args[0])[t] = i.has("any") ? set != 0 : i.has("all") ? set == ~0u : set == 0 || set == ~0u;
    }
  }
}

// abs takes sizes; without NaN a number wins against one
void reduce_floats(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const float* a = m.at<float>(i.args[1]);
  float* d = m.at<float>(i.args[0]);
  for (int w = 0; w < m.warps; ++w) {
    if (!m.active(32 * w)) continue;
    float x = std::numeric_limits<float>::quiet_NaN();
    bool nan = false;
    for (int t = 32 * w; t < 32 * w + 32; ++t) {
      const float y = i.has("abs") ? std::fabs(a[t]) : a[t];
      nan = nan || y != y;
      x = i.has("max") ? std::fmax(y, x) : std::fmin(y, x);
    }
    if (nan && i.has("NaN")) x = std::numeric_limits<float>::quiet_NaN();
    for (int t = 32 * w; t < 32 * w + 32; ++t) d[t] = x;
  }
}

template <class T> void reduce(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const T* a = m.at<T>(i.args[1]);
  T* d = m.at<T>(i.args[0]);
  for (int w = 0; w < m.warps; ++w) {
    if (!m.active(32 * w)) continue;
    T x = a[32 * w];
    for (int t = 32 * w + 1; t < 32 * w + 32; ++t)
      x = i.has("add")   ? T(uint32_t(x) + uint32_t(a[t]))
          : i.has("max") ? std::max(x, a[t])
          : i.has("min") ? std::min(x, a[t])
          : i.has("and") ? x & a[t]
          : i.has("or")  ? x | a[t]
                         : x ^ a[t];
    for (int t = 32 * w; t < 32 * w + 32; ++t) d[t] = x;
  }
}

// one thread of a warp: the first
void elect(Machine& m, const Instruction& i) {
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    m.at<uint32_t>(i.args[0])[t] = 0;
    m.at<bool>(i.args[1])[t] = (t & 31) == 0;
  }
}

}  // namespace

Handler warp(Instruction& i) {
  const std::string& base = i.parts[0];
  const size_t n = i.args.size();
  const bool three = base == "elect" || base == "vote" || base == "redux";
  if (base == "shfl" ? n != 5 && n != 6 : !three || n != 3) return nullptr;
  for (const Operand& x : i.args)
    if (x.kind == HALF || x.kind == DOUBLE) return nullptr;
  if (base == "shfl") return i.outputs = i.args.size() == 6 ? 2 : 1, shuffle;
  if (base == "elect") return i.outputs = 2, elect;
  if (base == "vote") return i.outputs = 1, vote;
  if (base != "redux") return nullptr;
  i.outputs = 1;
  return i.has("f32") ? reduce_floats : i.has("s32") ? reduce<int32_t> : reduce<uint32_t>;
}

}  // namespace ptx
