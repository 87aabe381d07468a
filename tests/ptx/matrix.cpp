// Products of the tensor cores up to Hopper: mma.sync and wgmma, with the layouts of their fragments and descriptors.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

// Products are exact in double precision; tensor cores round theirs to float32 somewhere within the sum.
void multiply(const float* a, const float* b, float* c, int rows, int columns, int depth) {
  std::vector<double> sums(static_cast<size_t>(columns));
  for (int r = 0; r < rows; ++r) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int k = 0; k < depth; ++k) {
      const double x = double(a[r * depth + k]);
      for (int n = 0; n < columns; ++n) sums[size_t(n)] += x * double(b[k * columns + n]);
    }
    for (int n = 0; n < columns; ++n) c[r * columns + n] = float(double(c[r * columns + n]) + sums[size_t(n)]);
  }
}

// 16 x 8 of 32-bit values among a warp's registers, as accumulators have them: lane 4 r + c / 2 holds rows r and r + 8
struct Place {
  int lane, index;
};
Place of_accumulator(int row, int column) { return {row % 8 * 4 + column % 8 / 2, row / 8 * 2 + column % 2}; }

// 16 rows of 16 two-byte elements from four registers
void fragment(Machine& m, const Instruction& i, size_t first, int warp, bool bf16, float* a) {
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) {
      const int lane = r % 8 * 4 + k % 8 / 2, index = r / 8 + k / 8 * 2;
      a[r * 16 + k] = widen(m.at<uint16_t>(i.args[first + size_t(index)])[(32 * warp + lane) * 2 + k % 2], bf16);
    }
}

float truncated(uint32_t bits) {  // tf32 ignores the last 13 bits
  bits &= 0xffffe000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// i.a: bf16, i.b: tf32; args: 4 of D, then A, B, 4 of C
void multiply_warp(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const int depth = i.b ? 8 : 16;
  const size_t of_b = 8, of_c = 10;
  float a[256], b[128], c[128];
  for (int w = 0; w < m.warps; ++w) {
    if (!m.active(32 * w)) continue;
    if (i.b) {
      for (int r = 0; r < 16; ++r)
        for (int k = 0; k < 8; ++k)
          a[r * 8 + k] = truncated(m.at<uint32_t>(i.args[4 + size_t(r / 8 + k / 4 * 2)])[32 * w + r % 8 * 4 + k % 4]);
    } else {
      fragment(m, i, 4, w, i.a, a);
    }
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) {
        if (i.b) {
          b[k * 8 + n] = truncated(m.at<uint32_t>(i.args[of_b + size_t(k / 4)])[32 * w + n * 4 + k % 4]);
        } else {
          const int lane = n * 4 + k % 8 / 2;
          b[k * 8 + n] = widen(m.at<uint16_t>(i.args[of_b + size_t(k / 8)])[(32 * w + lane) * 2 + k % 2], i.a);
        }
      }
    for (int r = 0; r < 16; ++r)
      for (int n = 0; n < 8; ++n) {
        const Place at = of_accumulator(r, n);
        c[r * 8 + n] = m.at<float>(i.args[of_c + size_t(at.index)])[32 * w + at.lane];
      }
    multiply(a, b, c, 16, 8, depth);
    for (int r = 0; r < 16; ++r)
      for (int n = 0; n < 8; ++n) {
        const Place at = of_accumulator(r, n);
        m.at<float>(i.args[size_t(at.index)])[32 * w + at.lane] = c[r * 8 + n];
      }
  }
}

}  // namespace

void gather(Machine& m, const Instruction& i, uint64_t start, uint64_t leading, uint64_t stride, int span, int bits,
            int rows, bool transposed, int warp, uint16_t* out) {
  if (transposed && span == 16) std::swap(leading, stride);  // the manual's offsets change roles without a swizzle
  // 16 bytes at a time: eight elements along k, or transposed along the rows
  for (int r = 0; r < rows; r += transposed ? 8 : 1)
    for (int k = 0; k < 16; k += transposed ? 1 : 8) {
      const int inner = (transposed ? r : k) * 2, outer = transposed ? k : r;
      uint64_t at = start + uint64_t(outer / 8) * stride + uint64_t(outer % 8 * span) +
                    uint64_t(inner / span) * leading + uint64_t(inner % span);
      at ^= (at >> 7 & uint64_t(bits)) << 4;
      read_operand(m, i, uint32_t(at), m.flight, warp);
      uint16_t row[8];
      memcpy(row, m.shared.data + at, 16);
      for (int e = 0; e < 8; ++e) out[transposed ? (r + e) * 16 + k : r * 16 + k + e] = row[e];
    }
}

namespace {

// wgmma's descriptor: start, leading and stride offset in units of 16 bytes, and the swizzle in the upper two bits
void read_matrix(Machine& m, const Instruction& i, const Operand& which, int group, int rows, bool transposed,
                 uint16_t* out) {
  const uint64_t* all = m.at<uint64_t>(which) + group * 128;
  const uint64_t x = all[0];
  for (int t = 1; t < 128; ++t)
    if (all[t] != x) m.fault(i, "a descriptor that differs within the warpgroup");
  if (x >> 49 & 7) m.fault(i, "not emulated: a base offset");
  static const int spans[] = {16, 128, 64, 32}, swizzles[] = {0, 7, 3, 1};
  gather(m, i, (x & 0x3fff) << 4, (x >> 16 & 0x3fff) << 4, (x >> 32 & 0x3fff) << 4, spans[x >> 62], swizzles[x >> 62],
         rows, transposed, -1, out);
}

void require_fence(Machine& m, const Instruction& i, const Operand& word) {
  if (m.checks && m.touched[size_t(word.value)] > m.fenced)
    m.race(i, "a register of wgmma that was written after the last wgmma.fence");
}

// i.a: bf16, i.b: columns; args: D, A (four registers or a descriptor), B, scale-d, scale-a, scale-b, transposed A, B
void multiply_warpgroup(Machine& m, const Instruction& i) {
  if (!m.all || m.threads % 128) m.fault(i, "wgmma by part of a warpgroup");
  const size_t sums = size_t(i.b) / 2;
  const bool registers = i.args[sums].kind == WORD;
  const size_t of_b = sums + (registers ? 4 : 1);
  const size_t scale = of_b + 1, last = i.args.size() - 1;
  const bool transposed_b = i.args[last].value != 0, transposed_a = !registers && i.args[last - 1].value != 0;
  if (i.args[scale + 1].value != 1 || i.args[scale + 2].value != 1) m.fault(i, "not emulated");
  const bool variable = i.args[scale].kind == PREDICATE;
  const bool keeps = variable ? m.at<bool>(i.args[scale])[0] : i.args[scale].value != 0;
  for (int t = 1; t < m.threads && variable; ++t)
    if (m.at<bool>(i.args[scale])[t] != keeps) m.fault(i, "threads of a warpgroup do not agree on scale-d");
  std::vector<float> a(64 * 16), b(size_t(16 * i.b)), c(size_t(64 * i.b));
  std::vector<uint16_t> raw(size_t(std::max(64, i.b)) * 16);
  for (size_t k = 0; k < sums && keeps; ++k) require_fence(m, i, i.args[k]);
  for (size_t k = sums; k < of_b && registers; ++k) {
    const size_t word = size_t(i.args[k].value);
    if (m.accumulator[word] && m.busy_word[word]) m.race(i, "a register before its wait");
    require_fence(m, i, i.args[k]);
  }
  for (int group = 0; group < m.warps / 4; ++group) {
    if (registers) {
      for (int w = 0; w < 4; ++w) fragment(m, i, sums, group * 4 + w, i.a, &a[size_t(w) * 256]);
    } else {
      read_matrix(m, i, i.args[sums], group, 64, transposed_a, raw.data());
      for (size_t k = 0; k < a.size(); ++k) a[k] = widen(raw[k], i.a);
    }
    read_matrix(m, i, i.args[of_b], group, i.b, transposed_b, raw.data());
    for (int n = 0; n < i.b; ++n)
      for (int k = 0; k < 16; ++k) b[size_t(k * i.b + n)] = widen(raw[size_t(n * 16 + k)], i.a);
    auto at = [&](int r, int n) -> float& {
      const Place place = of_accumulator(r % 16, n);
      return m.at<float>(i.args[size_t(n / 8 * 4 + place.index)])[group * 128 + r / 16 * 32 + place.lane];
    };
    for (int r = 0; r < 64; ++r)
      for (int n = 0; n < i.b; ++n) c[size_t(r * i.b + n)] = keeps ? at(r, n) : 0.0f;
    multiply(a.data(), b.data(), c.data(), 64, i.b, 16);
    for (int r = 0; r < 64; ++r)
      for (int n = 0; n < i.b; ++n) at(r, n) = c[size_t(r * i.b + n)];
  }
  if (!m.checks) return;
  for (size_t k = 0; k < of_b; ++k)
    if (i.args[k].kind == WORD) {
      const int word = int(i.args[k].value);
      ++m.busy_word[size_t(word)], ++m.busy;
      m.accumulator[size_t(word)] = k < sums;
      m.flight.registers.push_back(word);
    }
}

void fence_warpgroup(Machine& m, const Instruction& i) {
  if (!m.all) m.fault(i, "by part of a warpgroup");
  m.fenced = m.count;
}

void commit_warpgroup(Machine& m, const Instruction&) {
  m.flights.push_back(std::move(m.flight));
  m.flight = Flight();
}

void wait_for_warpgroup(Machine& m, const Instruction& i) {
  if (!m.all) m.fault(i, "by part of a warpgroup");
  while (m.flights.size() > size_t(i.args[0].value)) {
    release(m, m.flights.front(), true);
    m.flights.erase(m.flights.begin());
  }
}

}  // namespace

Handler matrix(Instruction& i) {
  if (i.parts[0] == "mma") {
    i.a = i.has("bf16");
    i.b = i.has("tf32") && i.has("m16n8k8");
    i.outputs = 4;
    const bool halves = i.has("m16n8k16") && (i.has("bf16") || i.has("f16"));
    const bool sums = i.parts.back() == "f32" && i.parts[i.parts.size() - 4] == "f32";
    for (const Operand& x : i.args)
      if (x.kind != WORD) return nullptr;
    return (i.b || halves) && sums && i.args.size() == 14 ? multiply_warp : nullptr;
  }
  if (i.parts[0] != "wgmma") return nullptr;
  if (i.has("fence")) return fence_warpgroup;
  if (i.has("commit_group")) return commit_warpgroup;
  if (i.has("wait_group")) return wait_for_warpgroup;
  for (const std::string& part : i.parts) {
    const size_t n = part.find('n');
    if (part.compare(0, 4, "m64n") || part.substr(part.find('k')) != "k16") continue;
    i.a = i.has("bf16");
    i.b = std::stoi(part.substr(n + 1));
    const size_t n_parts = i.parts.size();
    const bool halves = i.parts.back() == i.parts[n_parts - 2] && (i.parts.back() == "f16" || i.a);
    const bool whole = i.parts[n_parts - 3] == "f32" && i.args.size() >= size_t(i.b) / 2 + 6;
    return halves && whole ? multiply_warpgroup : nullptr;
  }
  return nullptr;
}

}  // namespace ptx
