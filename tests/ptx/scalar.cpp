// Instructions on the registers of a thread: arithmetic, comparisons, conversions, packing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

struct Entry {
  Handler run;
  std::vector<int> kinds;
  int outputs;
};
std::unordered_map<std::string, Entry>& table() {
  static std::unordered_map<std::string, Entry> entries;
  return entries;
}

template <class T> constexpr int kind_of() {
  return std::is_same<T, bool>::value ? PREDICATE : sizeof(T) == 2 ? HALF : sizeof(T) == 4 ? WORD : DOUBLE;
}

// d[t] = f(t) for every thread that runs the instruction; a destination may be an operand as well
template <class D, class F> inline void each(Machine& m, const Operand& to, F f) {
  D* d = m.at<D>(to);
  const int n = m.threads;
  if (m.all) {
#pragma GCC ivdep
    for (int t = 0; t < n; ++t) d[t] = f(t);
  } else {
    const uint8_t* mask = m.mask;
    for (int t = 0; t < n; ++t)
      if (mask[t]) d[t] = f(t);
  }
}

template <class D, class A, class F> void unary(const char* name) {
  table()[name] = {[](Machine& m, const Instruction& i) {
                     const A* a = m.at<A>(i.args[1]);
                     each<D>(m, i.args[0], [=](int t) { return D(F()(a[t])); });
                   },
                   {kind_of<D>(), kind_of<A>()}, 1};
}
template <class D, class A, class B, class F> void binary(const std::string& name) {
  table()[name] = {[](Machine& m, const Instruction& i) {
                     const A* a = m.at<A>(i.args[1]);
                     const B* b = m.at<B>(i.args[2]);
                     each<D>(m, i.args[0], [=](int t) { return D(F()(a[t], b[t])); });
                   },
                   {kind_of<D>(), kind_of<A>(), kind_of<B>()}, 1};
}
template <class D, class A, class B, class C, class F> void ternary(const std::string& name) {
  table()[name] = {[](Machine& m, const Instruction& i) {
                     const A* a = m.at<A>(i.args[1]);
                     const B* b = m.at<B>(i.args[2]);
                     const C* c = m.at<C>(i.args[3]);
                     each<D>(m, i.args[0], [=](int t) { return D(F()(a[t], b[t], c[t])); });
                   },
                   {kind_of<D>(), kind_of<A>(), kind_of<B>(), kind_of<C>()}, 1};
}

#define OPERATION(name, expression)                                \
  struct name {                                                    \
    template <class A> auto operator()(A a) const { return expression; } \
  };
#define OPERATION2(name, expression)                                         \
  struct name {                                                              \
    template <class A, class B> auto operator()(A a, B b) const { return expression; } \
  };
#define OPERATION3(name, expression)                                                          \
  struct name {                                                                               \
    template <class A, class B, class C> auto operator()(A a, B b, C c) const { return expression; } \
  };

OPERATION(Same, a)
OPERATION(Negative, -a)
OPERATION(Not, A(~a))
OPERATION(Absolute, a < 0 ? -a : a)
OPERATION(Ones, __builtin_popcountll(uint64_t(a)))
OPERATION(Zeros, a ? __builtin_clz(a) : 32)
OPERATION(Exp2, exp2f(a))
OPERATION(Log2, log2f(a))
OPERATION(Inverse, 1.0f / a)
OPERATION(Root, sqrtf(a))
OPERATION(InverseRoot, float(1.0 / sqrt(double(a))))
OPERATION2(Add, A(a + b))
OPERATION2(Subtract, A(a - b))
OPERATION2(Multiply, a * b)
OPERATION2(Quotient, a / b)
OPERATION2(Whole, b == 0 ? A(0) : b == A(-1) && a < 0 ? A(0 - a) : A(a / b))
OPERATION2(Rest, b == 0 ? a : b == A(-1) && a < 0 ? A(0) : A(a % b))
OPERATION2(And, A(a & b))
OPERATION2(Or, A(a | b))
OPERATION2(Xor, A(a ^ b))
OPERATION2(Left, b < sizeof(A) * 8 ? A(a << b) : A(0))
OPERATION2(Right, b < sizeof(A) * 8 ? A(a >> b) : a < 0 ? A(-1) : A(0))
OPERATION2(Least, std::min(a, b))
OPERATION2(Greatest, std::max(a, b))
// a NaN loses against a number, and -0 is less than +0
OPERATION2(LeastNumber, a < b || b != b || (a == b && std::signbit(a)) ? a : b)
OPERATION2(GreatestNumber, a > b || b != b || (a == b && !std::signbit(a)) ? a : b)
OPERATION2(GreatestOrNaN, a != a ? a : b != b ? b : GreatestNumber()(a, b))
OPERATION2(LeastOrNaN, a != a ? a : b != b ? b : LeastNumber()(a, b))
OPERATION2(High, uint32_t(uint64_t(a) * uint64_t(b) >> 32))
OPERATION2(HighSigned, int32_t(int64_t(a) * int64_t(b) >> 32))
OPERATION2(Less, a < b)
OPERATION2(LessEqual, a <= b)
OPERATION2(Greater, a > b)
OPERATION2(GreaterEqual, a >= b)
OPERATION2(Equal, a == b)
OPERATION2(Unequal, a == a && b == b && a != b)
OPERATION2(UnequalOrNaN, a != b)
OPERATION2(NotGreaterEqual, !(a >= b))
OPERATION2(NotGreater, !(a > b))
OPERATION2(NotLess, !(a < b))
OPERATION2(NotLessEqual, !(a <= b))
OPERATION2(AnyNaN, a != a || b != b)
OPERATION2(NoNaN, a == a && b == b)
OPERATION3(MultiplyAdd, C(C(a) * C(b) + c))
OPERATION3(Fused, fmaf(a, b, c))
OPERATION3(Select, c ? a : b)

// the NaN that an arithmetic instruction of f32 gives, whatever its operands are
template <class F> struct Canonical {
  template <class... A> float operator()(A... a) const {
    const float x = F()(a...);
    return x == x ? x : nan;
  }
  static inline const float nan = [] {
    const uint32_t bits = 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }();
};

template <class T> void integers(const std::string& type) {
  binary<T, T, T, Add>("add." + type);
  binary<T, T, T, Subtract>("sub." + type);
  binary<T, T, T, Multiply>("mul.lo." + type);
  binary<T, T, T, Whole>("div." + type);
  binary<T, T, T, Rest>("rem." + type);
  binary<T, T, T, Least>("min." + type);
  binary<T, T, T, Greatest>("max." + type);
  binary<T, T, uint32_t, Right>("shr." + type);
  ternary<T, T, T, T, MultiplyAdd>("mad.lo." + type);
  binary<bool, T, T, Less>("setp.lt." + type);
  binary<bool, T, T, LessEqual>("setp.le." + type);
  binary<bool, T, T, Greater>("setp.gt." + type);
  binary<bool, T, T, GreaterEqual>("setp.ge." + type);
  binary<bool, T, T, Equal>("setp.eq." + type);
  binary<bool, T, T, UnequalOrNaN>("setp.ne." + type);
  ternary<T, T, T, bool, Select>("selp." + type);
  unary<T, T, Same>(("mov." + type).c_str());
}

template <class T> void bits(const std::string& type) {
  binary<T, T, T, And>("and." + type);
  binary<T, T, T, Or>("or." + type);
  binary<T, T, T, Xor>("xor." + type);
  binary<T, T, uint32_t, Left>("shl." + type);
  binary<T, T, uint32_t, Right>("shr." + type);
  unary<T, T, Not>(("not." + type).c_str());
  unary<T, T, Same>(("mov." + type).c_str());
  binary<bool, T, T, Equal>("setp.eq." + type);
  binary<bool, T, T, UnequalOrNaN>("setp.ne." + type);
  ternary<T, T, T, bool, Select>("selp." + type);
}

// ftz flushes nothing here: results are those of the instruction without it
void floats() {
  for (const char* ftz : {"", "ftz."}) {
    auto name = [&](const char* before) { return std::string(before) + ftz + "f32"; };
    for (const char* rn : {"", "rn."}) {
      binary<float, float, float, Canonical<Add>>(name((std::string("add.") + rn).c_str()));
      binary<float, float, float, Canonical<Subtract>>(name((std::string("sub.") + rn).c_str()));
      binary<float, float, float, Canonical<Multiply>>(name((std::string("mul.") + rn).c_str()));
    }
    binary<float, float, float, Canonical<Quotient>>(name("div.full."));
    binary<float, float, float, Canonical<Quotient>>(name("div.rn."));
    binary<float, float, float, Canonical<LeastNumber>>(name("min."));
    binary<float, float, float, Canonical<GreatestNumber>>(name("max."));
    binary<float, float, float, Canonical<LeastOrNaN>>(std::string("min.") + ftz + "NaN.f32");
    binary<float, float, float, Canonical<GreatestOrNaN>>(std::string("max.") + ftz + "NaN.f32");
    ternary<float, float, float, float, Canonical<Fused>>(name("fma.rn."));
    for (const char* kind : {"approx.", "rn."}) {
      unary<float, float, Canonical<Inverse>>(name((std::string("rcp.") + kind).c_str()).c_str());
      unary<float, float, Canonical<Root>>(name((std::string("sqrt.") + kind).c_str()).c_str());
      unary<float, float, Canonical<InverseRoot>>(name((std::string("rsqrt.") + kind).c_str()).c_str());
    }
    unary<float, float, Canonical<Exp2>>(name("ex2.approx.").c_str());
    unary<float, float, Canonical<Log2>>(name("lg2.approx.").c_str());
    unary<float, float, Negative>(name("neg.").c_str());
    unary<float, float, Absolute>(name("abs.").c_str());
    binary<bool, float, float, Less>(name("setp.lt."));
    binary<bool, float, float, LessEqual>(name("setp.le."));
    binary<bool, float, float, Greater>(name("setp.gt."));
    binary<bool, float, float, GreaterEqual>(name("setp.ge."));
    binary<bool, float, float, Equal>(name("setp.eq."));
    binary<bool, float, float, Unequal>(name("setp.ne."));
    binary<bool, float, float, NotGreaterEqual>(name("setp.ltu."));
    binary<bool, float, float, NotGreater>(name("setp.leu."));
    binary<bool, float, float, NotLessEqual>(name("setp.gtu."));
    binary<bool, float, float, NotLess>(name("setp.geu."));
    binary<bool, float, float, UnequalOrNaN>(name("setp.neu."));
    binary<bool, float, float, AnyNaN>(name("setp.nan."));
    binary<bool, float, float, NoNaN>(name("setp.num."));
  }
  unary<float, float, Same>("mov.f32");
  ternary<float, float, float, bool, Select>("selp.f32");
}

// two floats in a 64-bit register
template <class F> void pairs(const char* name, int operands) {
  table()[name] = {[](Machine& m, const Instruction& i) {
                     const float* x[3] = {};
                     for (size_t k = 1; k < i.args.size(); ++k) x[k - 1] = m.at<float>(i.args[k]);
                     float* d = m.at<float>(i.args[0]);
                     for (int t = 0; t < 2 * m.threads; ++t)
                       if (m.active(t / 2)) d[t] = F()(x[0][t], x[1][t], x[2] ? x[2][t] : 0.0f);
                   },
                   std::vector<int>(size_t(operands) + 1, DOUBLE), 1};
}
OPERATION3(PairAdd, (void(c), a + b))
OPERATION3(PairSubtract, (void(c), a - b))
OPERATION3(PairMultiply, (void(c), a * b))

// rounded to odd: what is rounded to fewer bits next is rounded once
float odd(double x) {
  float f = float(x);
  if (double(f) == x || x != x || std::isinf(f)) return f;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (std::fabs(double(f)) > std::fabs(x)) --bits;
  bits |= 1;
  memcpy(&f, &bits, 4);
  return f;
}

// two halves in a 32-bit register, or one in a 16-bit register
template <class F, bool BF16> void halves_of(const std::string& name, int operands, bool packed) {
  table()[name + (packed ? "x2" : "")] = {[](Machine& m, const Instruction& i) {
                     const int n = i.args[0].kind == WORD ? 2 : 1;
                     const uint16_t* x[3] = {};
                     for (size_t k = 1; k < i.args.size(); ++k) x[k - 1] = m.at<uint16_t>(i.args[k]);
                     uint16_t* d = m.at<uint16_t>(i.args[0]);
                     for (int t = 0; t < n * m.threads; ++t) {
                       if (!m.active(t / n)) continue;
                       const double c = x[2] ? widen(x[2][t], BF16) : 0.0;
                       d[t] = narrow(odd(F()(double(widen(x[0][t], BF16)), double(widen(x[1][t], BF16)), c)), BF16);
                     }
                   },
                   std::vector<int>(size_t(operands) + 1, packed ? WORD : HALF), 1};
}
OPERATION3(WideAdd, (void(c), a + b))
OPERATION3(WideSubtract, (void(c), a - b))
OPERATION3(WideMultiply, (void(c), a * b))
OPERATION3(WideFused, a * b + c)

// bits [position, position + length) of a, with the sign of the last where the type has one
template <class T> void extract(const char* name) {
  ternary<T, T, uint32_t, uint32_t, decltype([](T a, uint32_t position, uint32_t length) {
    int width = int(sizeof(T) * 8), n = int(length & 255), from = int(position & 255);
    if (n == 0) return T(0);
    n = std::min(n, width);
    typename std::make_unsigned<T>::type x = from < width ? typename std::make_unsigned<T>::type(a) >> from : 0;
    bool negative = std::is_signed<T>::value && (a >> std::min(from + n - 1, width - 1) & 1);
    n = std::min(n, width - from);  // those beyond the last bit are copies of it
    if (n <= 0) return negative ? T(-1) : T(0);
    if (n < width) x &= (typename std::make_unsigned<T>::type(1) << n) - 1;
    if (negative && n < width) x |= ~typename std::make_unsigned<T>::type(0) << n;
    return T(x);
  })>(name);
}

void half_arithmetic() {
  for (bool packed : {false, true})
    for (const char* rn : {"", "rn."}) {
      const std::string r = rn;
      halves_of<WideAdd, true>("add." + r + "bf16", 2, packed);
      halves_of<WideSubtract, true>("sub." + r + "bf16", 2, packed);
      halves_of<WideMultiply, true>("mul." + r + "bf16", 2, packed);
      halves_of<WideFused, true>("fma." + r + "bf16", 3, packed);
      halves_of<WideAdd, false>("add." + r + "f16", 2, packed);
      halves_of<WideSubtract, false>("sub." + r + "f16", 2, packed);
      halves_of<WideMultiply, false>("mul." + r + "f16", 2, packed);
      halves_of<WideFused, false>("fma." + r + "f16", 3, packed);
    }
}

void various() {
  binary<uint64_t, uint32_t, uint32_t, decltype([](uint64_t a, uint64_t b) { return a * b; })>("mul.wide.u32");
  binary<int64_t, int32_t, int32_t, decltype([](int64_t a, int64_t b) { return a * b; })>("mul.wide.s32");
  binary<uint32_t, uint16_t, uint16_t, decltype([](uint32_t a, uint32_t b) { return a * b; })>("mul.wide.u16");
  binary<int32_t, int16_t, int16_t, decltype([](int32_t a, int32_t b) { return a * b; })>("mul.wide.s16");
  ternary<uint32_t, uint16_t, uint16_t, uint32_t, MultiplyAdd>("mad.wide.u16");
  ternary<int32_t, int16_t, int16_t, int32_t, MultiplyAdd>("mad.wide.s16");
  ternary<uint64_t, uint32_t, uint32_t, uint64_t, MultiplyAdd>("mad.wide.u32");
  ternary<int64_t, int32_t, int32_t, int64_t, MultiplyAdd>("mad.wide.s32");
  binary<uint16_t, uint16_t, uint16_t, decltype([](uint32_t a, uint32_t b) { return a * b >> 16; })>("mul.hi.u16");
  binary<uint32_t, uint32_t, uint32_t, High>("mul.hi.u32");
  binary<int32_t, int32_t, int32_t, HighSigned>("mul.hi.s32");
  extract<uint32_t>("bfe.u32");
  extract<int32_t>("bfe.s32");
  extract<uint64_t>("bfe.u64");
  extract<int64_t>("bfe.s64");
  unary<int32_t, int32_t, Negative>("neg.s32");
  unary<int64_t, int64_t, Negative>("neg.s64");
  unary<int32_t, int32_t, Absolute>("abs.s32");
  unary<uint32_t, uint32_t, Ones>("popc.b32");
  unary<uint32_t, uint32_t, Zeros>("clz.b32");
  // a predicate is 0 or 1
  binary<bool, bool, bool, And>("and.pred");
  binary<bool, bool, bool, Or>("or.pred");
  binary<bool, bool, bool, Xor>("xor.pred");
  unary<bool, bool, decltype([](bool a) { return !a; })>("not.pred");
  unary<bool, bool, Same>("mov.pred");
  pairs<PairAdd>("add.f32x2", 2);
  pairs<PairAdd>("add.rn.f32x2", 2);
  pairs<PairSubtract>("sub.f32x2", 2);
  pairs<PairSubtract>("sub.rn.f32x2", 2);
  pairs<PairMultiply>("mul.f32x2", 2);
  pairs<PairMultiply>("mul.rn.f32x2", 2);
  pairs<Fused>("fma.rn.f32x2", 3);
}

// ---- conversions

template <class T> T saturated(double x) {
  if (x != x) return 0;
  return x <= double(std::numeric_limits<T>::min())   ? std::numeric_limits<T>::min()
         : x >= double(std::numeric_limits<T>::max()) ? std::numeric_limits<T>::max()
                                                      : T(x);
}

template <class D, class S> void between(const char* to, const char* from) {
  unary<D, S, Same>((std::string("cvt.") + to + "." + from).c_str());
}

template <class T> void to_and_from_float(const std::string& type) {
  unary<float, T, Same>(("cvt.rn.f32." + type).c_str());
  unary<T, float, decltype([](float x) { return saturated<T>(std::trunc(x)); })>(("cvt.rzi." + type + ".f32").c_str());
  unary<T, float, decltype([](float x) { return saturated<T>(std::floor(x)); })>(("cvt.rmi." + type + ".f32").c_str());
  unary<T, float, decltype([](float x) { return saturated<T>(std::rint(x)); })>(("cvt.rni." + type + ".f32").c_str());
}

template <bool BF16> void halves(const std::string& type) {
  unary<float, uint16_t, decltype([](uint16_t x) { return widen(x, BF16); })>(("cvt.f32." + type).c_str());
  unary<uint16_t, float, decltype([](float x) { return narrow(x, BF16); })>(("cvt.rn." + type + ".f32").c_str());
  // the first operand goes to the upper half
  binary<uint32_t, float, float, decltype([](float a, float b) {
           return uint32_t(narrow(a, BF16)) << 16 | narrow(b, BF16);
         })>("cvt.rn." + type + "x2.f32");
}

void conversions() {
  between<uint64_t, uint32_t>("u64", "u32");
  between<int64_t, int32_t>("s64", "s32");
  between<uint64_t, uint16_t>("u64", "u16");
  between<int64_t, int16_t>("s64", "s16");
  between<uint32_t, uint64_t>("u32", "u64");
  between<uint32_t, uint64_t>("u32", "s64");
  between<uint32_t, uint16_t>("u32", "u16");
  between<int32_t, int16_t>("s32", "s16");
  between<uint16_t, uint32_t>("u16", "u32");
  between<uint16_t, uint64_t>("u16", "u64");
  between<int32_t, uint32_t>("s32", "u32");
  to_and_from_float<int32_t>("s32");
  to_and_from_float<uint32_t>("u32");
  to_and_from_float<int64_t>("s64");
  to_and_from_float<uint64_t>("u64");
  halves<true>("bf16");
  halves<false>("f16");
  // to nearest, ties away from zero: 10 bits of fraction are left
  unary<uint32_t, uint32_t, decltype([](uint32_t x) {
          return (x & 0x7fffffff) > 0x7f800000 ? 0x7fffffffu : (x + 0x1000) & 0xffffe000u;
        })>("cvt.rna.tf32.f32");
}

// ---- packing and unpacking registers

void pack(Machine& m, const Instruction& i) {
  const Operand& whole = i.args[0];
  int n = int(i.args.size()) - 1, width = BYTES[whole.kind] / n;
  uint8_t* d = m.at<uint8_t>(whole);
  for (int k = 0; k < n; ++k) {
    const uint8_t* s = m.at<uint8_t>(i.args[size_t(k) + 1]);
    for (int t = 0; t < m.threads; ++t)
      if (m.active(t)) memcpy(d + (t * n + k) * width, s + t * width, size_t(width));
  }
}

void unpack(Machine& m, const Instruction& i) {
  const Operand& whole = i.args.back();
  int n = int(i.args.size()) - 1, width = BYTES[whole.kind] / n;
  const std::vector<uint8_t> s(m.at<uint8_t>(whole), m.at<uint8_t>(whole) + m.threads * BYTES[whole.kind]);
  for (int k = 0; k < n; ++k) {
    uint8_t* d = m.at<uint8_t>(i.args[size_t(k)]);
    for (int t = 0; t < m.threads; ++t)
      if (m.active(t)) memcpy(d + t * width, &s[size_t((t * n + k) * width)], size_t(width));
  }
}

// prmt: every byte of the result is one of the eight bytes of a and b
void permute(Machine& m, const Instruction& i) {
  const uint32_t *a = m.at<uint32_t>(i.args[1]), *b = m.at<uint32_t>(i.args[2]), *s = m.at<uint32_t>(i.args[3]);
  each<uint32_t>(m, i.args[0], [=](int t) {
    uint64_t bytes = uint64_t(b[t]) << 32 | a[t];
    uint32_t made = 0;
    for (int k = 0; k < 4; ++k) {
      uint32_t which = s[t] >> (4 * k) & 15;
      uint32_t byte = uint32_t(bytes >> (8 * (which & 7))) & 255;
      if (which & 8) byte = byte & 128 ? 255 : 0;
      made |= byte << (8 * k);
    }
    return made;
  });
}

// shf: a funnel shift of the pair (b, a)
void funnel(Machine& m, const Instruction& i) {
  const uint32_t *a = m.at<uint32_t>(i.args[1]), *b = m.at<uint32_t>(i.args[2]), *c = m.at<uint32_t>(i.args[3]);
  bool left = i.has("l"), clamp = i.has("clamp");
  each<uint32_t>(m, i.args[0], [=](int t) {
    uint32_t n = clamp ? std::min(c[t], 32u) : c[t] & 31;
    uint64_t both = uint64_t(b[t]) << 32 | a[t];
    return left ? uint32_t(both << n >> 32) : uint32_t(both >> n);
  });
}

void fill() {
  integers<int16_t>("s16");
  integers<uint16_t>("u16");
  integers<int32_t>("s32");
  integers<uint32_t>("u32");
  integers<int64_t>("s64");
  integers<uint64_t>("u64");
  bits<uint16_t>("b16");
  bits<uint32_t>("b32");
  bits<uint64_t>("b64");
  floats();
  half_arithmetic();
  various();
  conversions();
  table()["prmt.b32"] = {permute, {WORD, WORD, WORD, WORD}, 1};
  for (const char* name : {"shf.l.wrap.b32", "shf.r.wrap.b32", "shf.l.clamp.b32", "shf.r.clamp.b32"})
    table()[name] = {funnel, {WORD, WORD, WORD, WORD}, 1};
}

}  // namespace

uint16_t narrow(float value, bool bf16) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (bf16) {
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  if (rest < 0x38800000) {  // subnormal: a multiple of 2^-24
    float size;
    memcpy(&size, &rest, 4);
    return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.0f)));
  }
  rest += 0xfff + (rest >> 13 & 1);
  return uint16_t(sign | std::min((rest >> 13) - (112u << 10), 0x7c00u));
}

Handler scalar(Instruction& i) {
  if (table().empty()) fill();
  const std::string name = i.text();
  if (i.parts[0] == "mov" && i.args.size() > 2) {
    i.outputs = BYTES[i.args[0].kind] > BYTES[i.args[1].kind] ? 1 : int(i.args.size()) - 1;
    return i.outputs == 1 ? pack : unpack;
  }
  auto found = table().find(name);
  if (found == table().end()) return nullptr;
  std::vector<int> kinds;
  for (const Operand& x : i.args) kinds.push_back(x.kind);
  if (name == "cvt.s64.s32" && kinds[1] == DOUBLE) {  // of the lower half of a register
    i.outputs = 1;
    return [](Machine& m, const Instruction& i) {
      const int64_t* a = m.at<int64_t>(i.args[1]);
      each<int64_t>(m, i.args[0], [=](int t) { return int64_t(int32_t(a[t])); });
    };
  }
  if (kinds != found->second.kinds) throw Fault(name + ": operands of other sizes than it takes");
  i.outputs = found->second.outputs;
  return found->second.run;
}

}  // namespace ptx
