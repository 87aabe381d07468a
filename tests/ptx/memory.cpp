// Loads and stores, with what they are checked for: bounds, alignment, bytes that nobody wrote, races.
//
// A race is an access that no barrier orders after another thread's access to the same bytes, one of them a write that
// changes them: within a CTA between two bar.sync, for threads of one warp between two bar.warp.sync, and in global
// memory between any two CTAs. cp.async writes from its issue until the wait, matrix instructions read until theirs.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

bool apart(uint16_t who, uint16_t sync, const Machine& m, int thread) {
  if (who == NOBODY || who == thread) return false;
  return who == MANY || who / 32 != thread / 32 || sync == m.syncs[size_t(thread) / 32];
}

// both: with an atomic operation after another one, of a scope that reaches other CTAs
void between_ctas(Machine& m, const Instruction& i, Mark& mark, bool write, bool both) {
  if (!both && mark.cta != NO_CTA && mark.cta != m.number)
    m.race(i, write ? "two CTAs write" : "reads what another CTA writes");
  if (write && mark.reader_cta != NO_CTA && mark.reader_cta != m.number) m.race(i, "writes what another CTA reads");
  if (write) mark.cta = m.number;
  else mark.reader_cta = mark.reader_cta == NO_CTA || mark.reader_cta == m.number ? m.number : MANY_CTAS;
}

// in this CTA, since the last barrier: a read that another thread's is not ordered with
bool read_by_another(const Machine& m, const Mark& mark, int thread) {
  if (mark.read != m.epoch) return false;
  if (apart(mark.reader, mark.reader_sync, m, thread)) return true;
  return mark.others && mark.reader == thread && mark.reader_sync == m.syncs[size_t(thread) / 32];
}

}  // namespace

void Machine::race(const Instruction& i, const char* what) { ++races[std::string(what) + ": " + i.text()]; }

void Machine::fault(const Instruction& i, const std::string& what) const {
  std::string where;
  for (int axis = 0; axis < 3; ++axis) where += (axis ? ", " : "") + std::to_string(cta[axis]);
  throw Fault(what + ": instruction " + std::to_string(pc) + " " + i.text() + ", CTA (" + where + ")");
}

void check(Machine& m, const Instruction& i, Memory& where, uint64_t address, int bytes, int thread,
           const uint8_t* stored, bool atomic) {
  const bool write = stored != nullptr;
  const uint64_t last = address + uint64_t(bytes) - 1;
  const bool outside = last >= where.size || last < address ||
                       (where.owner && (!where.owner[address] || where.owner[address] != where.owner[last]));
  if (outside) m.fault(i, std::string("out of bounds of ") + where.name + " memory, thread " + std::to_string(thread));
  if (address % uint64_t(bytes)) m.fault(i, std::string("misaligned access to ") + where.name + " memory");
  if (!m.checks) return;
  if (!where.global && i.parts[0] != "mbarrier")
    for (const auto& barrier : m.barriers)
      if (address < barrier.first + 8 && barrier.first <= last) m.race(i, "touches an mbarrier");
  const uint16_t sync = m.syncs[size_t(thread) / 32];
  for (uint64_t at = address; at <= last; ++at) {
    Mark& mark = where.marks[at];
    const bool both = atomic && mark.atomic;
    if (where.global) between_ctas(m, i, mark, write, both && !i.has("cta"));
    else if (!write && !mark.known) m.race(i, "reads shared memory that nobody wrote");
    if (mark.copying)
      m.race(i, write ? "overwrites what cp.async may still write" : "reads what cp.async may still write");
    if (write && mark.in_flight) m.race(i, "overwrites an operand of a matrix instruction in flight");
    const bool now = mark.cta == m.number || !where.global;
    const bool seen = mark.reader_cta == m.number || mark.reader_cta == MANY_CTAS || !where.global;
    const bool same = write && where.data[at] == stored[at - address];
    if (!same && !both && now && mark.written == m.epoch && apart(mark.writer, mark.writer_sync, m, thread))
      m.race(i, write ? "two threads write without a barrier between" : "reads without a barrier after the write");
    if (write && seen && read_by_another(m, mark, thread)) m.race(i, "writes without a barrier after the read");
    if (write) {
      mark.written = m.epoch, mark.writer = uint16_t(thread), mark.writer_sync = sync;
      mark.known = true, mark.fence = m.fences, mark.atomic = atomic;
    } else {
      const bool again = mark.read == m.epoch && mark.reader != NOBODY && mark.reader != thread;
      const bool other = again && (mark.reader == MANY || mark.reader / 32 != thread / 32);
      mark.others = mark.read == m.epoch && mark.reader_sync == sync && (mark.others || again);
      mark.read = m.epoch, mark.reader = other ? MANY : uint16_t(thread), mark.reader_sync = sync;
    }
  }
}

// A write of ordinary instructions is seen by matrix instructions after a fence of its warp or of the one that reads.
bool fenced(const Machine& m, const Mark& mark, int warp) {
  if (m.fenced_at[size_t(mark.writer) / 32] > mark.fence) return true;
  if (warp >= 0) return m.fenced_at[size_t(warp)] > mark.fence;
  return std::all_of(m.fenced_at.begin(), m.fenced_at.end(), [&](uint32_t at) { return at > mark.fence; });
}

void read_operand(Machine& m, const Instruction& i, uint32_t address, Flight& flight, int warp) {
  if (address + 16 > m.shared.size) m.fault(i, "a matrix outside of shared memory");
  if (!m.checks) return;
  for (uint32_t at = address; at < address + 16; ++at) {
    Mark& mark = m.shared.marks[at];
    if (!mark.known) m.race(i, "reads shared memory that nobody wrote");
    if (mark.copying) m.race(i, "reads what cp.async may still write");
    if (mark.written == m.epoch && mark.writer != NOBODY) m.race(i, "reads without a barrier after the write");
    if (mark.known && !fenced(m, mark, warp)) m.race(i, "reads what no fence made visible to the async proxy");
    ++mark.in_flight;
  }
  flight.operands.push_back(address);
}

void release(Machine& m, const Flight& flight, bool by_warpgroup) {
  for (uint32_t address : flight.operands)
    for (uint32_t at = address; at < address + 16; ++at) {
      Mark& mark = m.shared.marks[at];
      --mark.in_flight;
      if (by_warpgroup) mark.read = m.epoch, mark.reader = MANY;  // each warp has waited for itself alone
    }
  for (int word : flight.registers) --m.busy_word[size_t(word)], --m.busy;
  for (int column : flight.columns) --m.tensor_busy[size_t(column)];
}

namespace {

Memory& space(Machine& m, const Instruction& i) { return i.a ? m.global : m.shared; }

uint64_t address(Machine& m, const Operand& base, const Operand& offset, int thread) {
  uint64_t from = base.kind == DOUBLE ? m.at<uint64_t>(base)[thread] : m.at<uint32_t>(base)[thread];
  return from + uint64_t(offset.value);
}

// i.a: global; i.b: bytes of an element; i.c: of how many; the type's sign extends what a wider register takes
void load(Machine& m, const Instruction& i) {
  Memory& from = space(m, i);
  const size_t n = size_t(i.c);
  const bool sign = i.parts.back()[0] == 's';
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint64_t at = address(m, i.args[n], i.args[n + 1], t);
    check(m, i, from, at, i.b * i.c, t, nullptr);
    for (size_t k = 0; k < n; ++k) {
      const int width = BYTES[i.args[k].kind];
      uint8_t* d = m.at<uint8_t>(i.args[k]) + t * width;
      const uint8_t* s = from.data + at + k * size_t(i.b);
      memset(d, sign && (s[i.b - 1] & 128) ? 255 : 0, size_t(width));
      memcpy(d, s, size_t(i.b));
    }
  }
}

void store(Machine& m, const Instruction& i) {
  Memory& to = space(m, i);
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint64_t at = address(m, i.args[0], i.args[1], t);
    uint8_t stored[32];
    for (size_t k = 0; k < size_t(i.c); ++k)
      memcpy(stored + k * size_t(i.b), m.at<uint8_t>(i.args[k + 2]) + t * BYTES[i.args[k + 2].kind], size_t(i.b));
    check(m, i, to, at, i.b * i.c, t, stored);
    memcpy(to.data + at, stored, size_t(i.b * i.c));
  }
}

void load_parameter(Machine& m, const Instruction& i) {
  const int width = BYTES[i.args[0].kind];
  uint8_t* d = m.at<uint8_t>(i.args[0]);
  const uint8_t* s = reinterpret_cast<const uint8_t*>(m.parameters) + i.args[1].value;
  for (int t = 0; t < m.threads; ++t)
    if (m.active(t)) memcpy(d + t * width, s, size_t(width));
}

// atom and red: additions that other threads and CTAs may make at the same time
void add_atomically(Machine& m, const Instruction& i) {
  const size_t first = i.parts[0] == "atom" ? 1 : 0;
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint64_t at = address(m, i.args[first], i.args[first + 1], t);
    uint8_t* where = space(m, i).data + at;
    uint32_t old = 0, add = m.at<uint32_t>(i.args[first + 2])[t], made;
    check(m, i, space(m, i), at, i.b, t, reinterpret_cast<const uint8_t*>(&add), true);
    memcpy(&old, where, 4);
    if (i.has("f32")) {
      float x, y;
      memcpy(&x, &old, 4), memcpy(&y, &add, 4);
      x += y;
      memcpy(&made, &x, 4);
    } else {
      made = old + add;
    }
    memcpy(where, &made, 4);
    if (first) m.at<uint32_t>(i.args[0])[t] = old;
  }
}

// ---- cp.async: shared memory is written at once, but may be read after the wait alone

void copy(Machine& m, const Instruction& i) {
  const int bytes = int(i.args[4].value);
  for (int t = 0; t < m.threads; ++t) {
    if (!m.active(t)) continue;
    const uint64_t to = address(m, i.args[0], i.args[1], t);
    int taken = bytes;
    if (i.args.size() > 5) taken = i.args[5].kind == LITERAL ? int(i.args[5].value) : int(m.at<uint32_t>(i.args[5])[t]);
    if (taken < 0 || taken > bytes) m.fault(i, "copies more than there is room for");
    uint8_t copied[16] = {};
    if (taken) {
      const uint64_t from = address(m, i.args[2], i.args[3], t);
      check(m, i, m.global, from, taken & (taken - 1) ? bytes : taken, t, nullptr);
      memcpy(copied, m.global.data + from, size_t(taken));
    }
    check(m, i, m.shared, to, bytes, t, copied);
    memcpy(m.shared.data + to, copied, size_t(bytes));
    if (!m.checks) continue;
    for (uint64_t at = to; at < to + uint64_t(bytes); ++at) m.shared.marks[at].copying = true;
    m.copying[size_t(t) / 32].push_back({uint32_t(to), bytes, t});
  }
}

void commit_copies(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  for (size_t w = 0; w < size_t(m.warps); ++w) {
    if (!m.active(int(w) * 32)) continue;
    m.copy_groups[w].push_back(std::move(m.copying[w]));
    m.copying[w].clear();
  }
}

// Triton puts no fence between cp.async and wgmma, so copies count as visible to matrix instructions.
void wait_for_copies(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const size_t left = i.args.empty() ? 0 : size_t(i.args[0].value);
  for (size_t w = 0; w < size_t(m.warps); ++w) {
    auto& groups = m.copy_groups[w];
    for (; m.active(int(w) * 32) && groups.size() > left; groups.erase(groups.begin()))
      for (const Machine::Copy& one : groups.front())
        for (uint32_t at = one.address; at < one.address + uint32_t(one.bytes); ++at) {
          Mark& mark = m.shared.marks[at];
          mark.copying = false, mark.fence = 0;
          mark.written = m.epoch, mark.writer = uint16_t(one.thread), mark.writer_sync = m.syncs[w];
        }
  }
}

// ---- ldmatrix and stmatrix: 8 x 8 matrices of two bytes, one row of 16 bytes a thread's address

// where element (row, column) of a matrix lies among the warp's registers: (lane, half)
void place(int row, int column, bool transposed, int& lane, int& half) {
  if (transposed) std::swap(row, column);
  lane = row * 4 + column / 2, half = column % 2;
}

void matrices(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  const bool loads = i.parts[0] == "ldmatrix", transposed = i.has("trans");
  const size_t first = loads ? 0 : 2, base = loads ? size_t(i.c) : 0;
  for (int w = 0; w < m.warps; ++w) {
    if (!m.active(32 * w)) continue;
    for (int k = 0; k < i.c; ++k)
      for (int row = 0; row < 8; ++row) {
        const int t = 32 * w + 8 * k + row;
        const uint64_t at = address(m, i.args[base], i.args[base + 1], t);
        uint8_t row_bytes[16];
        for (int column = 0; column < 8 && !loads; ++column) {
          int lane, half;
          place(row, column, transposed, lane, half);
          memcpy(row_bytes + column * 2, m.at<uint16_t>(i.args[first + size_t(k)]) + (32 * w + lane) * 2 + half, 2);
        }
        check(m, i, m.shared, at, 16, t, loads ? nullptr : row_bytes);
        for (int column = 0; column < 8; ++column) {
          int lane, half;
          place(row, column, transposed, lane, half);
          uint16_t* bits = m.at<uint16_t>(i.args[first + size_t(k)]) + (32 * w + lane) * 2 + half;
          uint8_t* byte = m.shared.data + at + column * 2;
          loads ? memcpy(bits, byte, 2) : memcpy(byte, bits, 2);
        }
      }
  }
}

// ---- barriers

void barrier_of_all(Machine& m, const Instruction& i) {
  if (i.args.size() > 1 || i.args[0].kind != LITERAL || i.args[0].value != 0) m.fault(i, "not emulated");
  ++m.epoch;  // all threads are here: see step
}

void warp_barrier(Machine& m, const Instruction& i) {
  whole_warps(m, i);
  for (int w = 0; w < m.warps; ++w)
    if (m.active(32 * w)) ++m.syncs[size_t(w)];
}

void fence(Machine& m, const Instruction& i) {
  if (!i.has("proxy") || i.parts.back() == "global") return;
  ++m.fences;
  for (int t = 0; t < m.threads; ++t)
    if (m.active(t)) m.fenced_at[size_t(t) / 32] = m.fences;
}

void nothing(Machine&, const Instruction&) {}

}  // namespace

Handler memory(Instruction& i) {
  const std::string &base = i.parts[0], last = i.parts.back();
  i.a = i.has("global");
  i.c = i.has("v2") || i.has("x2") ? 2 : i.has("v4") || i.has("x4") ? 4 : i.has("v8") ? 8 : 1;
  if (base == "ld" && i.has("param")) return i.outputs = 1, load_parameter;
  if (base == "ld" || base == "st" || base == "atom" || base == "red") {
    i.b = std::stoi(last.substr(1)) / 8;
    const size_t operands = size_t(base == "atom" ? 4 : base == "red" ? 3 : i.c + 2);
    if (i.b * i.c > 32 || i.args.size() < operands) return nullptr;
    if (!i.a && !i.has("shared") && !i.has("shared::cta")) return nullptr;
    i.outputs = base == "ld" ? i.c : base == "atom";
    if (base == "ld") return load;
    if (base == "st") return store;
    return i.has("add") && i.b == 4 ? add_atomically : nullptr;
  }
  if (base == "cp" && i.has("async") && i.has("commit_group")) return commit_copies;
  if (base == "cp" && i.has("async") && (i.has("wait_group") || i.has("wait_all"))) return wait_for_copies;
  if (base == "cp" && i.has("async") && i.a && (i.has("ca") || i.has("cg")))
    return i.args.size() >= 5 && i.args[4].kind == LITERAL && i.args[4].value <= 16 ? copy : nullptr;
  if ((base == "ldmatrix" || base == "stmatrix") && i.has("m8n8") && last == "b16" && int(i.args.size()) == i.c + 2)
    return i.outputs = base == "ldmatrix" ? i.c : 0, matrices;
  if (base == "bar" && last == "sync" && !i.has("warp")) return i.waits = true, barrier_of_all;
  if (base == "barrier" && i.has("sync")) return i.waits = true, barrier_of_all;
  if (base == "bar" && i.has("warp")) return warp_barrier;
  if (base == "fence" || base == "membar") return fence;
  if (base == "griddepcontrol" || base == "nanosleep") return nothing;
  return nullptr;
}

}  // namespace ptx
