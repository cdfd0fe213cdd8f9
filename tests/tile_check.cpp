// csrc/cpu/tile.cpp against plain loops that share nothing with it: numbers are taken apart and
// rounded bit by bit. It needs no torch to run, so test_tile.py runs it for other processors too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/cpu/tile.h"

using fastclip::Dtype;
using fastclip::Norm;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
const double kNan = std::nan("");

struct Format {
  Dtype dtype;
  const char* name;
  int bits, digits;  // of the significand, with the hidden one

  int bias() const { return (1 << (bits - digits - 1)) - 1; }
  uint64_t sign() const { return uint64_t{1} << (bits - 1); }
  uint64_t infinity() const { return sign() - (uint64_t{1} << (digits - 1)); }
};

constexpr Format kFormats[] = {{Dtype::kFloat, "float32", 32, 24},
                               {Dtype::kBFloat16, "bfloat16", 16, 8},
                               {Dtype::kHalf, "float16", 16, 11},
                               {Dtype::kDouble, "float64", 64, 53}};

double value_of(const Format& f, uint64_t bits) {
  const uint64_t magnitude = bits & (f.sign() - 1);
  const int64_t exponent = magnitude >> (f.digits - 1);
  const int64_t fraction = magnitude & ((int64_t{1} << (f.digits - 1)) - 1);
  const int64_t whole = exponent > 0 ? fraction + (int64_t{1} << (f.digits - 1)) : fraction;
  const int shift = std::max<int>(exponent, 1) - f.bias() - f.digits + 1;
  double value = magnitude > f.infinity() ? kNan : std::ldexp(static_cast<double>(whole), shift);
  if (magnitude == f.infinity()) value = kInf;
  return std::copysign(value, bits & f.sign() ? -1.0 : 1.0);
}

// The nearest number of the format, of two the even one.
double rounded(const Format& f, double x) {
  if (!std::isfinite(x) || x == 0) return x;
  const int shift = std::max(std::ilogb(x), 1 - f.bias()) - f.digits + 1;
  const double value = std::ldexp(std::nearbyint(std::ldexp(x, -shift)), shift);
  return std::abs(value) < std::ldexp(1.0, f.bias()) * 2 ? value : std::copysign(kInf, x);
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Elements in memory that begins at any of them, with others round it that must stay.
class Tile {
 public:
  Tile(const Format& f, std::vector<uint64_t> elements, size_t offset)
      : format_(f), elements_(std::move(elements)), offset_(offset) {
    memory_.assign((elements_.size() + offset + kAfter) * width(), kMark);
    for (size_t i = 0; i < size(); ++i) std::memcpy(at(i), &elements_[i], width());
  }

  size_t size() const { return elements_.size(); }
  void* data() { return at(0); }
  double before(size_t i) const { return value_of(format_, elements_[i]); }
  uint64_t now(size_t i) {
    uint64_t bits = 0;
    std::memcpy(&bits, at(i), width());
    return bits;
  }
  bool is_unchanged(size_t i) { return now(i) == elements_[i]; }
  bool has_its_borders() const {
    const auto is_mark = [](unsigned char byte) { return byte == kMark; };
    const auto end = memory_.end() - kAfter * width();
    return std::all_of(memory_.begin(), memory_.begin() + offset_ * width(), is_mark) &&
           std::all_of(end, memory_.end(), is_mark);
  }

 private:
  static constexpr size_t kAfter = 32;
  static constexpr unsigned char kMark = 0x35;
  size_t width() const { return format_.bits / 8; }
  unsigned char* at(size_t i) { return memory_.data() + (offset_ + i) * width(); }

  const Format& format_;
  std::vector<uint64_t> elements_;
  size_t offset_;
  std::vector<unsigned char> memory_;
};

int failures = 0;

void expect(bool right, const Format& f, const char* what, size_t size, double p, double found,
            double expected) {
  if (right || ++failures > 20) return;
  std::printf("%s: %s of %zu, %g: found %.17g, expected %.17g\n", f.name, what, size, p, found,
              expected);
}

void check_measure(const Format& f, Tile& tile, double p) {
  long double total = 0, most = 0;
  bool has_nan = false;
  for (size_t i = 0; i < tile.size(); ++i) {
    most = std::max(most, std::abs(static_cast<long double>(tile.before(i))));
    has_nan |= std::isnan(tile.before(i));
  }
  const bool plain = p == 1 || p == 2;
  const long double unit = plain || most == 0 || std::isinf(most) ? 1 : most;
  for (size_t i = 0; i < tile.size(); ++i) {
    const long double x = std::abs(static_cast<long double>(tile.before(i))) / unit;
    total += p == 1 ? x : p == 2 ? x * x : std::pow(x, static_cast<long double>(p));
  }
  double expected = plain ? total : unit * std::pow(total, 1 / static_cast<long double>(p));
  if (std::isinf(p) || std::isinf(most)) expected = most;
  if (has_nan) expected = kNan;
  const double found =
      fastclip::cpu::measure(tile.data(), f.dtype, tile.size(), fastclip::norm_kind(p));
  // 32 lanes, and the tree that adds them up.
  const double eps = std::numeric_limits<double>::epsilon();
  const double slack = (tile.size() / 32 + 40 + (plain ? 0 : tile.size())) * eps;
  const bool near = same(found, expected) || std::abs(found - expected) <= slack * expected;
  expect(near, f, "norm", tile.size(), p, found, expected);
  for (size_t i = 0; i < tile.size(); ++i)
    expect(tile.is_unchanged(i), f, "read element", tile.size(), p, i, i);
}

void check_scale(const Format& f, Tile tile, double coef) {
  const Format& wide = kFormats[f.dtype == Dtype::kDouble ? 3 : 0];
  const double c = rounded(wide, coef);
  fastclip::cpu::scale(tile.data(), f.dtype, tile.size(), coef);
  for (size_t i = 0; i < tile.size(); ++i) {
    const double product = rounded(wide, tile.before(i) * c);
    const double expected = c == 0 && std::signbit(c) ? 0 : rounded(f, product);
    const double found = value_of(f, tile.now(i));
    expect(same(found, expected), f, "product", tile.size(), coef, found, expected);
  }
  expect(tile.has_its_borders(), f, "border of products", tile.size(), coef, 0, 0);
}

void check_clamp(const Format& f, Tile tile, double bound) {
  const double limit = rounded(f, bound);
  fastclip::cpu::clamp(tile.data(), f.dtype, tile.size(), bound);
  for (size_t i = 0; i < tile.size(); ++i) {
    const double x = tile.before(i), found = value_of(f, tile.now(i));
    const double expected = std::isnan(x) ? x : std::min(std::max(x, -limit), limit);
    expect(found == expected || same(found, expected), f, "clamp", tile.size(), bound, found,
           expected);
  }
  expect(tile.has_its_borders(), f, "border of clamp", tile.size(), bound, 0, 0);
}

void check(const Format& f, const std::vector<uint64_t>& elements, size_t offset, bool summed) {
  Tile tile(f, elements, offset);
  if (summed)
    for (const double p : {1.0, 2.0, kInf}) check_measure(f, tile, p);
  for (const double c : {0.3, 0.0, -0.0, 1e-5, 3.0, -1.0, 0x1p-16, 0x1p100, kInf, kNan})
    check_scale(f, tile, c);
  for (const double bound : {0.0, 0.1, 1.0, 65510.0, 1e9, kInf}) check_clamp(f, tile, bound);
}

}  // namespace

int main() {
  std::mt19937_64 random(0);
  for (const Format& f : kFormats) {
    const uint64_t one = static_cast<uint64_t>(f.bias()) << (f.digits - 1);
    const uint64_t unit = uint64_t{1} << (f.digits - 1), all = f.sign() | (f.sign() - 1);
    const auto near_one = [&] { return (one + random() % (2 * unit)) | (random() & f.sign()); };
    const auto subnormal = [&] { return random() % unit | (random() & f.sign()); };
    // Powers of a double stay in its range; other dtypes are measured up to their largest.
    const uint64_t lowest = f.bits == 64 ? one - 500 * unit : 0;
    const uint64_t range = f.bits == 64 ? 1000 * unit : f.infinity();
    const auto any_finite = [&] { return (lowest + random() % range) | (random() & f.sign()); };
    for (const size_t size : {1, 7, 8, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1000, 4099}) {
      std::vector<uint64_t> x(size);
      const auto fill = [&](auto&& make) { std::generate(x.begin(), x.end(), make); };
      for (const size_t offset : {0, 1, 3}) {
        fill(near_one);
        check(f, x, offset, true);
        fill(any_finite);
        check(f, x, offset, true);
        fill(subnormal);
        check(f, x, offset, f.bits < 64);
      }
      for (const uint64_t bad : {f.infinity(), f.infinity() | f.sign(), f.infinity() + unit / 2}) {
        fill(near_one);
        x[random() % size] = bad;
        check(f, x, 1, true);
      }
      fill([&] { return one / 3 * 3 - unit / 3; });
      check(f, x, 1, true);
    }
    // Each that a dtype of 16 bits has.
    std::vector<uint64_t> every(65536);
    for (size_t i = 0; i < every.size(); ++i) every[i] = i;
    if (f.bits > 16)
      for (uint64_t& x : every) x = random() & all;
    check(f, every, 0, false);
  }
  std::printf("%d failures\n", failures);
  return failures > 0;
}
