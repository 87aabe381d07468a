// Blackwell's tensor memory: tcgen05 for one CTA, and the mbarriers that its products are waited for with.
//
// Tensor memory is 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. A product of 128 rows has
// row r in lane r, one of 64 rows in lane 32 (r / 16) + r % 16, or 16 lanes further.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr int LANES = 128, COLUMNS = 512;

uint32_t& cell(Machine& m, const Instruction& i, int lane, int column) {
  if (lane >= LANES || column >= m.tensor_first || !m.tensor_columns)
    m.fault(i, "outside of the tensor memory that is allocated");
  return m.tensor[size_t(column * LANES + lane)];
}

// What happens to a column is noted for each half of the lanes of a warp: two products of 64 rows may share columns.
size_t half(int lane, int column) { return size_t(column) * 2 + size_t(lane % 32 >= 16); }

uint32_t base(Machine& m, const Operand& x, const Operand& offset, int thread) {
  return m.at<uint32_t>(x)[thread] + uint32_t(offset.value);
}

int only_thread(Machine& m, const Instruction& i) {
  int found = -1;
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    if (found >= 0) m.fault(i, "issued by more than one thread");
    found = t;
  }
  return found;
}

void allocate(Machine& m, const Instruction& i) {
  const int t = int(std::find(m.mask, m.mask + (m.all ? 0 : m.threads), 1) - m.mask) * !m.all;
  const uint32_t at = m.at<uint32_t>(i.args[0])[t] + uint32_t(i.args[1].value);
  const int columns = int(i.args[2].value);
  if (columns < 32 || columns & (columns - 1) || m.tensor_first + columns > COLUMNS) m.fault(i, "too many columns");
  const uint32_t first = uint32_t(m.tensor_first);
  check(m, i, m.shared, at, 4, t, reinterpret_cast<const uint8_t*>(&first));
  memcpy(m.shared.data + at, &first, 4);
  m.tensor_columns += columns, m.tensor_first += columns;
}

void free_columns(Machine& m, const Instruction& i) {
  if (i.args.back().kind != LITERAL) m.fault(i, "not emulated");
  m.tensor_columns -= int(i.args.back().value);
  for (uint32_t loaded : m.tensor_read)
    if (loaded == m.epoch && m.checks) {
      m.race(i, "tensor memory is given back without a barrier after the load");
      break;
    }
  if (m.flight.columns.size()) m.fault(i, "tensor memory is given back while a product is in flight");
}

void nothing(Machine&, const Instruction&) {}

// Warps four apart share lanes.
void among_warps(Machine& m, const Instruction& i, Machine::Access& last, int warp, bool loads) {
  if (last.stored == m.epoch && last.storer != warp) m.race(i, "tensor memory: no barrier after another warp's store");
  if (!loads && last.loaded == m.epoch && last.loader != warp)
    m.race(i, "tensor memory: no barrier after another warp's load");
  if (loads) last.loaded = m.epoch, last.loader = warp;
  else last.stored = m.epoch, last.storer = warp;
}

// i.a: registers; i.b: two halves of a warp, each 16 lanes, the second from another column on
void move(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const bool loads = i.has("ld");
  const size_t at = loads ? size_t(i.a) : 0, first = loads ? 0 : i.args.size() - size_t(i.a);
  const int split = i.b ? int(i.args[at + 2].value) : 0;
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint32_t from = base(m, i.args[at], i.args[at + 1], t);
    const int lane = int(from >> 16), column = int(from & 0xffff);
    if (lane / 32 != t / 32 % 4 || lane % (i.b ? 16 : 32)) m.fault(i, "lanes that belong to another warp");
    for (int k = 0; k < i.a; ++k) {
      const int c = column + k + (i.b && t % 32 >= 16 ? split : 0);
      const int l = lane + (i.b ? t % 16 : t % 32);
      uint32_t& x = cell(m, i, l, c);
      if (m.checks && m.tensor_busy[half(l, c)]) m.race(i, "tensor memory of a product in flight");
      if (m.checks && loads && m.tensor_pending[half(l, c)]) m.race(i, "tensor memory that is still stored to");
      if (m.checks) among_warps(m, i, m.tensor_access[half(l, c) * 4 + size_t(l / 32)], t / 32, loads);
      uint32_t& word = m.at<uint32_t>(i.args[first + size_t(k)])[t];
      loads ? word = x : x = word;
      if (loads) m.tensor_read[half(l, c)] = m.epoch;
      else m.tensor_stored[half(l, c)] = m.epoch, m.tensor_pending[half(l, c)] = 1;
    }
  }
  for (int k = 0; k < i.a && loads && m.checks; ++k) {
    const int word = int(i.args[size_t(k)].value);
    ++m.busy_word[size_t(word)], ++m.busy;
    m.loads.registers.push_back(word);
  }
}

// by any threads: registers of others that wait later are not watched in the meantime
void wait_for_loads(Machine& m, const Instruction&) {
  release(m, m.loads, false);
  m.loads = Flight();
}

void wait_for_stores(Machine& m, const Instruction&) {
  std::fill(m.tensor_pending.begin(), m.tensor_pending.end(), 0u);
}

// Blackwell's descriptor differs from Hopper's in the swizzle's code, in the upper three bits
void read_matrix(Machine& m, const Instruction& i, uint64_t x, int rows, bool transposed, int warp, uint16_t* out) {
  const int code = int(x >> 61), span = code == 2 ? 128 : code == 4 ? 64 : code == 6 ? 32 : 16;
  if (code % 2 || (x >> 46 & 7) != 1 || (x >> 49 & 7)) m.fault(i, "a descriptor that is not emulated");
  gather(m, i, (x & 0x3fff) << 4, (x >> 16 & 0x3fff) << 4, (x >> 32 & 0x3fff) << 4, span, span / 16 - 1, rows,
         transposed, warp, out);
}

void use(Machine& m, const Instruction& i, size_t c, bool writes) {
  if (m.tensor_pending[c]) m.race(i, "tensor memory that is still stored to");
  if (m.tensor_stored[c] == m.epoch) m.race(i, "tensor memory: no barrier after the store");
  if (writes && m.tensor_read[c] == m.epoch) m.race(i, "tensor memory: no barrier after the load");
  ++m.tensor_busy[c];
  m.flight.columns.push_back(int(c));
}

// of a product of some rows, from an address on: a column's halves
void use_column(Machine& m, const Instruction& i, uint32_t from, int k, int rows, bool writes) {
  const int column = int(from & 0xffff) + k;
  if (!m.checks) return;
  use(m, i, half(int(from >> 16), column), writes);
  if (rows == LANES) use(m, i, half(16, column), writes);
}

// args: D and its offset; A: its descriptor, or an address and its offset; B; the instruction's descriptor; keeps D
void multiply(Machine& m, const Instruction& i) {
  const int t = only_thread(m, i);
  const bool a_in_tensor = i.args[2].kind == WORD;
  const size_t of_b = a_in_tensor ? 4 : 3;
  const uint32_t shape = m.at<uint32_t>(i.args[of_b + 1])[t];
  const int rows = int(shape >> 24 & 31) << 4, columns = int(shape >> 17 & 63) << 3;
  const bool bf16 = shape >> 7 & 7, transposed_a = shape >> 15 & 1, transposed_b = shape >> 16 & 1;
  const bool same = (shape >> 7 & 7) == (shape >> 10 & 7);
  if ((shape >> 4 & 3) != 1 || (shape >> 13 & 3) || (rows != 64 && rows != 128) || !same) m.fault(i, "not emulated");
  if (columns % (rows == 128 ? 16 : 8)) m.fault(i, "a number of columns that it does not take");
  const bool keeps = m.at<bool>(i.args[of_b + 2])[t];
  const uint32_t d = base(m, i.args[0], i.args[1], t);
  auto lane = [&](uint32_t from, int r) { return int(from >> 16) + (rows == 128 ? r : r / 16 * 32 + r % 16); };
  std::vector<uint16_t> a(size_t(rows) * 16), b(size_t(columns) * 16);
  if (a_in_tensor) {
    const uint32_t from = base(m, i.args[2], i.args[3], t);
    for (int k = 0; k < 8; ++k) {
      for (int r = 0; r < rows; ++r) {
        const uint32_t two = cell(m, i, lane(from, r), int(from & 0xffff) + k);
        a[size_t(r * 16 + 2 * k)] = uint16_t(two), a[size_t(r * 16 + 2 * k + 1)] = uint16_t(two >> 16);
      }
      use_column(m, i, from, k, rows, false);
    }
  } else {
    read_matrix(m, i, m.at<uint64_t>(i.args[2])[t], rows, transposed_a, t / 32, a.data());
  }
  read_matrix(m, i, m.at<uint64_t>(i.args[of_b])[t], columns, transposed_b, t / 32, b.data());
  std::vector<double> wide(size_t(columns) * 16);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < 16; ++k) wide[size_t(k * columns + n)] = widen(b[size_t(n * 16 + k)], bf16);
  std::vector<double> sums(static_cast<size_t>(columns));
  for (int r = 0; r < rows; ++r) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int k = 0; k < 16; ++k) {
      const double x = widen(a[size_t(r * 16 + k)], bf16);
      for (int n = 0; n < columns; ++n) sums[size_t(n)] += x * wide[size_t(k * columns + n)];
    }
    for (int n = 0; n < columns; ++n) {
      float& x = reinterpret_cast<float&>(cell(m, i, lane(d, r), int(d & 0xffff) + n));
      x = float((keeps ? double(x) : 0.0) + sums[size_t(n)]);
    }
  }
  for (int n = 0; n < columns; ++n) use_column(m, i, d, n, rows, true);
}

// ---- mbarriers: 64 bits of shared memory whose phase ends when all expected arrivals have come

Barrier& barrier_at(Machine& m, const Instruction& i, uint64_t address) {
  auto found = m.barriers.find(uint32_t(address));
  if (found == m.barriers.end()) m.fault(i, "an mbarrier that was not initialized");
  return found->second;
}

uint64_t of_barrier(Machine& m, const Instruction& i, size_t at, int t) {
  const Operand& x = i.args[at];
  const uint64_t from = x.kind == DOUBLE ? m.at<uint64_t>(x)[t] : m.at<uint32_t>(x)[t];
  return from + uint64_t(i.args[at + 1].value);
}

void initialize(Machine& m, const Instruction& i) {
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint64_t at = of_barrier(m, i, 0, t);
    const uint8_t state[8] = {};
    check(m, i, m.shared, at, 8, t, state);
    Barrier made;
    made.thread = t, made.epoch = m.epoch;
    made.expected = made.pending = int(i.args[2].value);
    m.barriers[uint32_t(at)] = made;
  }
}

void invalidate(Machine& m, const Instruction& i) {
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    for (const Flight& flight : barrier_at(m, i, of_barrier(m, i, 0, t)).flights)
      if (!flight.columns.empty()) m.race(i, "given back before its product was waited for");
    m.barriers.erase(uint32_t(of_barrier(m, i, 0, t)));
  }
}

void commit(Machine& m, const Instruction& i) {
  Barrier& x = barrier_at(m, i, of_barrier(m, i, 0, only_thread(m, i)));
  x.flights.push_back(std::move(m.flight));
  m.flight = Flight();
  if (--x.pending == 0) ++x.phase, x.pending = x.expected;
}

void try_wait(Machine& m, const Instruction& i) {
  std::vector<Barrier*> failed;
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    Barrier& x = barrier_at(m, i, of_barrier(m, i, 1, t));
    const Operand& parity = i.args[3];
    const uint32_t waited = parity.kind == LITERAL ? uint32_t(parity.value) : m.at<uint32_t>(parity)[t];
    if (m.checks && x.epoch == m.epoch && x.thread != t) m.race(i, "no barrier after the mbarrier was made");
    const bool complete = (x.phase & 1) != (waited & 1) && (x.flights.empty() || x.tried);
    m.at<bool>(i.args[0])[t] = complete;
    if (!complete) {
      failed.push_back(&x);
      continue;
    }
    if (m.checks && !m.all && !x.flights.empty()) m.race(i, "a product that some threads alone wait for");
    for (const Flight& flight : x.flights) release(m, flight, false);
    x.flights.clear(), x.tried = false;
  }
  for (Barrier* x : failed) x->tried = true;
}

}  // namespace

Handler tensor(Instruction& i) {
  if (i.parts[0] == "mbarrier") {
    if (i.has("init")) return initialize;
    if (i.has("inval")) return invalidate;
    if (i.has("try_wait") && i.has("parity")) return i.outputs = 1, try_wait;
    return nullptr;
  }
  if (i.parts[0] != "tcgen05") return nullptr;
  if (i.has("alloc")) return allocate;
  if (i.has("dealloc")) return free_columns;
  if (i.has("commit")) return commit;
  if (i.has("mma") && i.has("kind::f16") && i.has("cta_group::1") && !i.has("ws")) return multiply;
  if (i.has("wait::st")) return wait_for_stores;
  if (i.has("wait::ld")) return wait_for_loads;
  if (i.has("relinquish_alloc_permit") || i.has("fence::before_thread_sync") ||
      i.has("fence::after_thread_sync"))
    return nothing;
  if ((i.has("ld") || i.has("st")) && (i.has("32x32b") || i.has("16x32bx2")) && i.parts.back() == "b32" &&
      !i.has("pack::16b") && !i.has("unpack::16b")) {
    i.b = i.has("16x32bx2");
    for (const std::string& part : i.parts)
      if (part[0] == 'x') i.a = std::stoi(part.substr(1));
    i.outputs = i.has("ld") ? i.a : 0;
    return move;
  }
  return nullptr;
}

}  // namespace ptx
