// A CPU that runs one CTA of a PTX kernel at a time: all its threads in lockstep, a register being a row of one value
// a thread. Threads that take different branches run one group after the other and join where they meet again, at a
// barrier at the latest.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum Kind { LITERAL, PREDICATE, HALF, WORD, DOUBLE };
constexpr int BYTES[] = {0, 1, 2, 4, 8};

struct Operand {
  int kind;
  int64_t value;  // a number, or of which register of its kind
};

struct Machine;
struct Instruction;
using Handler = void (*)(Machine&, const Instruction&);

struct Instruction {
  Handler run = nullptr;
  int guard = -1;  // predicate
  bool negated = false;
  bool waits = false;  // for all threads
  std::vector<Operand> args;
  std::vector<std::string> parts;  // "add", "s32"
  int outputs = 0;                 // of args, the registers that it writes
  int a = 0, b = 0, c = 0;         // what a handler has read from parts

  bool has(const char* part) const;
  std::string text() const;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr uint16_t NOBODY = 0xffff, MANY = 0xfffe;
constexpr int NO_CTA = -1, MANY_CTAS = -2;

// What happened to a byte last.
struct Mark {
  uint32_t written = 0, read = 0;              // between which barriers; 0 is before the first
  uint16_t writer = NOBODY, reader = NOBODY;   // thread, or MANY: threads of several warps
  uint16_t writer_sync = 0, reader_sync = 0;   // between which barriers of their warp
  uint32_t fence = 0;                          // fences between proxies before it was written
  uint16_t in_flight = 0;                      // matrix instructions that may still read it
  bool copying = false, known = false;         // cp.async may still write it; it was written at all
  bool atomic = false;                         // by an atomic operation, which other ones may follow
  bool others = false;                         // the reader is not the only one since its warp's last barrier
  int cta = NO_CTA, reader_cta = NO_CTA;       // of global memory: who wrote and read it in this launch
};

// Shared or global memory.
struct Memory {
  const char* name = "";
  bool global = false;
  uint8_t* data = nullptr;
  uint64_t size = 0;
  const uint16_t* owner = nullptr;  // of global memory: which allocation a byte belongs to, 0 for none
  std::vector<Mark> marks;
};

// What matrix instructions in flight read and write until they are waited for.
struct Flight {
  std::vector<uint32_t> operands;  // addresses of 16 bytes of shared memory
  std::vector<int> registers, columns;  // halves of them
};

// An mbarrier. A wait fails at first where products are in flight, so that one that does not try again is seen.
struct Barrier {
  int expected = 0, pending = 0;
  int thread = 0;      // that made it
  uint32_t epoch = 0;  // and between which barriers
  bool tried = false;
  uint32_t phase = 0;
  std::vector<Flight> flights;
};

struct Group {
  int pc;
  std::vector<uint8_t> mask;
  bool waiting;  // at a barrier, for the others
};

struct Program {
  std::vector<Instruction> code;
  int registers[5] = {};
  std::vector<int64_t> constants;  // kind, register, value
  std::vector<int64_t> special;    // of %tid.x and so on: which, register
};

struct Machine {
  const Program* program = nullptr;
  int threads = 0, warps = 0;
  int grid[3] = {}, cta[3] = {}, number = 0;
  const uint64_t* parameters = nullptr;
  bool checks = true;
  std::vector<uint8_t> files[5];
  Memory shared, global;
  std::vector<uint8_t> shared_bytes;

  std::vector<Group> groups;
  bool all = true;          // every thread runs the instruction
  const uint8_t* mask = nullptr;
  std::vector<uint8_t> guarded;
  int pc = 0;
  uint64_t count = 0, limit = 0;

  uint32_t epoch = 1, fences = 1;
  std::vector<uint32_t> fenced_at;  // of warps: their last fence between proxies, counted
  std::vector<uint16_t> syncs;  // of warps
  struct Copy { uint32_t address; int bytes; int thread; };
  std::vector<std::vector<std::vector<Copy>>> copy_groups;  // of every warp, committed
  std::vector<std::vector<Copy>> copying;                   // of every warp, not committed
  std::vector<Flight> flights;                 // of wgmma, committed
  Flight flight;                               // of wgmma or tcgen05, not committed
  Flight loads;                                // of tensor memory, not waited for
  int busy = 0;                                // registers that wgmma or a load may still write or read
  std::vector<uint16_t> busy_word;
  std::vector<uint8_t> accumulator;            // whether a 32-bit register was one in the last wgmma that named it
  std::vector<uint64_t> touched;               // when a 32-bit register was written last
  uint64_t fenced = 0;                         // when the last wgmma.fence ran
  std::map<uint32_t, Barrier> barriers;
  std::vector<uint32_t> tensor;                // [column][lane] of tensor memory
  // of both halves of its columns: products in flight, stores not waited for, and when they were stored to and loaded
  // from last
  std::vector<uint32_t> tensor_busy, tensor_pending, tensor_stored, tensor_read;
  struct Access { uint32_t stored = 0, loaded = 0; int storer = -1, loader = -1; };
  std::vector<Access> tensor_access;           // of a half of a column by the warps that share these lanes
  int tensor_columns = 0, tensor_first = 0;    // allocated, and where the next ones begin
  std::map<std::string, int64_t> races;

  template <class T> T* at(const Operand& x) {
    if (x.kind == LITERAL) throw Fault("not emulated: a number where a register is expected");
    return reinterpret_cast<T*>(files[x.kind].data() + size_t(x.value) * BYTES[x.kind] * threads);
  }
  bool active(int thread) const { return all || mask[thread]; }
  void race(const Instruction& i, const char* what);
  [[noreturn]] void fault(const Instruction& i, const std::string& what) const;
};

// a handler for what the instruction says, or nullptr
Handler scalar(Instruction& i);
Handler warp(Instruction& i);
Handler memory(Instruction& i);
Handler matrix(Instruction& i);
Handler tensor(Instruction& i);

// warp.cpp: faults where only some threads of a warp run the instruction, or its member mask leaves some out
void whole_warps(Machine& m, const Instruction& i);

// memory.cpp
// stored: what will be written, or nullptr for a load; atomic: by an atomic operation
void check(Machine& m, const Instruction& i, Memory& where, uint64_t address, int bytes, int thread,
           const uint8_t* stored, bool atomic = false);
// by a warp, or by all for -1
void read_operand(Machine& m, const Instruction& i, uint32_t address, Flight& flight, int warp);
void release(Machine& m, const Flight& flight, bool by_warpgroup);

// matrix.cpp: rows x 16 two-byte elements of a shared memory descriptor
void gather(Machine& m, const Instruction& i, uint64_t start, uint64_t leading, uint64_t stride, int span, int bits,
            int rows, bool transposed, int warp, uint16_t* out);

inline float widen(uint16_t bits, bool bf16) {
  union { uint32_t word; float value; } x;
  if (bf16) { x.word = uint32_t(bits) << 16; return x.value; }
  uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) {  // zero and subnormal numbers: a multiple of 2^-24
    x.value = float(fraction) * 5.9604644775390625e-8f;
    x.word |= sign;
    return x.value;
  }
  x.word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  return x.value;
}
uint16_t narrow(float value, bool bf16);  // to nearest even

}  // namespace ptx
