// Runs a program: CTA after CTA, instruction after instruction, and the C functions that the tests call.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {

bool Instruction::has(const char* part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

std::string Instruction::text() const {
  std::string made;
  for (const std::string& part : parts) made += (made.empty() ? "" : ".") + part;
  return made;
}

namespace {

// what step does itself
void branch(Machine&, const Instruction&) {}
void leave(Machine&, const Instruction&) {}

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts(1);
  for (size_t k = 0; k < text.size(); ++k) {
    if (text[k] == by) parts.emplace_back();
    else parts.back() += text[k];
  }
  return parts;
}

Program* load(const char* operations, const int64_t* words, const int64_t* registers) {
  auto* made = new Program;
  for (int kind = 1; kind < 5; ++kind) made->registers[kind] = int(registers[kind]);
  for (const std::string& operation : split(operations, '\n')) {
    Instruction i;
    i.parts = split(operation, '.');
    i.guard = int(*words++);
    i.negated = *words++ != 0;
    for (int64_t n = *words++; n > 0; --n, words += 2) i.args.push_back({int(words[0]), words[1]});
    const std::string& base = i.parts[0];
    if (base == "bra") i.run = branch;
    else if (base == "ret" || base == "exit") i.run = leave;
    for (Handler (*find)(Instruction&) : {scalar, warp, memory, matrix, tensor})
      if (!i.run) i.run = find(i);
    if (!i.run) throw Fault("not emulated: " + operation);
    made->code.push_back(i);
  }
  return made;
}

void begin(Machine& m) {
  const Program& p = *m.program;
  for (int kind = 1; kind < 5; ++kind)
    m.files[kind].assign(size_t(p.registers[kind]) * size_t(BYTES[kind] * m.threads), 0);
  for (size_t k = 0; k < p.constants.size(); k += 3) {
    const int kind = int(p.constants[k]);
    for (int t = 0; t < m.threads; ++t)
      memcpy(m.at<uint8_t>({kind, p.constants[k + 1]}) + t * BYTES[kind], &p.constants[k + 2], size_t(BYTES[kind]));
  }
  for (size_t k = 0; k < p.special.size(); k += 2) {
    const int which = int(p.special[k]);  // tid, ctaid, ntid, nctaid times four, plus the axis; laneid, warpid
    uint32_t* to = m.at<uint32_t>({WORD, p.special[k + 1]});
    for (int t = 0; t < m.threads; ++t) {
      const int axis = which % 4;
      const int of[] = {axis ? 0 : t, m.cta[axis % 3], axis ? 1 : m.threads, m.grid[axis % 3], axis ? t / 32 : t % 32};
      to[t] = uint32_t(of[which / 4]);
    }
  }
  m.shared_bytes.assign(m.shared.size + 16, 0xff);
  m.shared.data = m.shared_bytes.data();
  m.shared.marks.assign(m.shared.size + 16, Mark());
  m.groups.assign(1, {0, std::vector<uint8_t>(size_t(m.threads), 1), false});
  m.syncs.assign(size_t(m.warps), 1);
  m.busy_word.assign(size_t(p.registers[WORD]), 0);
  m.accumulator.assign(size_t(p.registers[WORD]), 0);
  m.touched.assign(size_t(p.registers[WORD]), 0);
  m.copy_groups.assign(size_t(m.warps), {});
  m.copying.assign(size_t(m.warps), {});
  m.flights.clear(), m.barriers.clear();
  m.flight = Flight(), m.loads = Flight();
  m.busy = 0, m.fenced = 0, m.count = 0, m.tensor_columns = 0, m.tensor_first = 0;
  m.epoch = 1, m.fences = 1, m.fenced_at.assign(size_t(m.warps), 0);
  m.tensor.assign(128 * 512, 0x7fc00000);
  m.tensor_busy.assign(1024, 0), m.tensor_pending.assign(1024, 0);
  m.tensor_stored.assign(1024, 0), m.tensor_read.assign(1024, 0);
  m.tensor_access.assign(4096, {});
}

// The threads whose program counter is the least run next, but those that wait; groups that have met become one.
Group& next(Machine& m) {
  std::vector<Group>& groups = m.groups;
  for (size_t a = 0; a < groups.size(); ++a)
    for (size_t b = groups.size() - 1; b > a; --b)
      if (groups[a].pc == groups[b].pc) {
        for (int t = 0; t < m.threads; ++t) groups[a].mask[size_t(t)] |= groups[b].mask[size_t(t)];
        groups[a].waiting = false;
        groups.erase(groups.begin() + int64_t(b));
      }
  return *std::min_element(groups.begin(), groups.end(), [](const Group& a, const Group& b) {
    return a.waiting != b.waiting ? b.waiting : a.pc < b.pc;
  });
}

void watch_registers(Machine& m, const Instruction& i) {
  if (m.busy && i.parts[0] != "wgmma")
    for (const Operand& x : i.args)
      if (x.kind == WORD && m.busy_word[size_t(x.value)]) m.race(i, "a register before its wait");
  for (int k = 0; k < i.outputs; ++k)
    if (i.args[size_t(k)].kind == WORD) m.touched[size_t(i.args[size_t(k)].value)] = m.count;
}

// Runs the instruction for the threads of group that its guard lets through.
void step(Machine& m, Group& group) {
  const Instruction& i = m.program->code[size_t(m.pc = group.pc)];
  const uint8_t* mask = group.mask.data();
  int running = 0, members = 0;
  if (i.guard >= 0) {
    const bool* p = m.at<bool>({PREDICATE, i.guard});
    for (int t = 0; t < m.threads; ++t) {
      m.guarded[size_t(t)] = mask[t] && p[t] != i.negated;
      running += m.guarded[size_t(t)], members += mask[t];
    }
  } else {
    for (int t = 0; t < m.threads; ++t) members += mask[t];
    running = members;
  }
  ++m.count;
  if (i.run == branch || i.run == leave) {
    if (running == members && i.run == branch) {
      group.pc = int(i.args[0].value);
      return;
    }
    if (running == 0) {
      ++group.pc;
      return;
    }
    Group leaving{i.run == branch ? int(i.args[0].value) : -1, i.guard >= 0 ? m.guarded : group.mask, false};
    for (int t = 0; t < m.threads; ++t) group.mask[size_t(t)] &= uint8_t(!leaving.mask[size_t(t)]);
    ++group.pc;
    const bool empty = running == members;
    if (i.run == branch) m.groups.push_back(leaving);  // group is no longer valid
    if (empty) m.groups.erase(std::find_if(m.groups.begin(), m.groups.end(), [](const Group& g) {
      return std::find(g.mask.begin(), g.mask.end(), 1) == g.mask.end();
    }));
    return;
  }
  if (i.waits && running < m.threads) {
    if (group.waiting || running < members) m.fault(i, "a barrier that not all threads come to");
    group.waiting = true;
    return;
  }
  ++group.pc;
  if (running == 0) return;
  m.all = running == m.threads;
  m.mask = i.guard >= 0 ? m.guarded.data() : mask;
  if (m.checks) watch_registers(m, i);
  i.run(m, i);
}

void run_cta(Machine& m) {
  begin(m);
  m.guarded.assign(size_t(m.threads), 0);
  while (!m.groups.empty()) {
    if (m.count > m.limit) m.fault(m.program->code[size_t(m.pc)], "more instructions than a kernel of this size runs");
    if (m.groups.size() == 1) step(m, m.groups[0]);
    else step(m, next(m));
  }
  if (m.tensor_columns) m.fault(m.program->code[size_t(m.pc)], "tensor memory is not given back");
}

char* copied(const std::string& text) {
  char* made = static_cast<char*>(malloc(text.size() + 1));
  memcpy(made, text.c_str(), text.size() + 1);
  return made;
}

}  // namespace
}  // namespace ptx

extern "C" {

// operations: one a line. A text is why it cannot be run; it and the program are freed by ptx_free and ptx_unload.
void* ptx_load(const char* operations, const int64_t* words, const int64_t* registers, const int64_t* constants,
               int64_t n_constants, const int64_t* special, int64_t n_special, char** fault) {
  *fault = nullptr;
  try {
    ptx::Program* p = ptx::load(operations, words, registers);
    p->constants.assign(constants, constants + 3 * n_constants);
    p->special.assign(special, special + 2 * n_special);
    return p;
  } catch (const std::exception& error) {
    *fault = ptx::copied(error.what());
    return nullptr;
  }
}

void ptx_unload(void* program) { delete static_cast<ptx::Program*>(program); }
void ptx_free(char* text) { free(text); }

// Runs all CTAs; data is global memory, owner which allocation a byte belongs to. Returns the number of instructions.
// report: lines "count<tab>race", freed by ptx_free; fault: what stopped it.
int64_t ptx_run(const void* program, const int64_t* grid, int64_t threads, int64_t shared, const uint64_t* parameters,
                uint8_t* data, const uint16_t* owner, int64_t size, int64_t checks, int64_t limit, char** report,
                char** fault) {
  ptx::Machine m;
  m.program = static_cast<const ptx::Program*>(program);
  m.threads = int(threads), m.warps = int(threads / 32);
  m.parameters = parameters;
  m.checks = checks != 0;
  m.limit = uint64_t(limit);
  m.shared.name = "shared", m.shared.size = uint64_t(shared);
  m.global.name = "global", m.global.global = true, m.global.data = data, m.global.owner = owner;
  m.global.size = uint64_t(size);
  if (m.checks) m.global.marks.assign(size_t(size + 16), ptx::Mark());
  for (int axis = 0; axis < 3; ++axis) m.grid[axis] = int(grid[axis]);
  int64_t count = 0;
  *fault = nullptr;
  try {
    for (m.cta[2] = 0; m.cta[2] < grid[2]; ++m.cta[2])
      for (m.cta[1] = 0; m.cta[1] < grid[1]; ++m.cta[1])
        for (m.cta[0] = 0; m.cta[0] < grid[0]; ++m.cta[0], ++m.number) {
          ptx::run_cta(m);
          count += int64_t(m.count);
        }
  } catch (const std::exception& error) {
    *fault = ptx::copied(error.what());
  }
  std::string lines;
  for (const auto& race : m.races) lines += std::to_string(race.second) + "\t" + race.first + "\n";
  *report = ptx::copied(lines);
  return count;
}

}  // extern "C"
