// What several tests need: the bundle of format 1 in tests/fixtures, copies of it to damage, and texts of errors.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "bca/session.hpp"
#include "bytes.hpp"

namespace support {

namespace fs = std::filesystem;

inline const fs::path kRepository = BCA_REPOSITORY;
inline const fs::path kFixture = kRepository / "tests/fixtures/format1";

/// A directory that goes with the test.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "bca-test-XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary directory");
    path = name;
  }
  ~TemporaryDirectory() { fs::remove_all(path); }

  fs::path path;
};

/// A variable of the environment, for as long as this lives.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) { setenv(name, value.c_str(), 1); }
  ~Variable() { unsetenv(name_); }

 private:
  const char* name_;
};

/// A copy of the fixture, to change.
class BundleCopy {
 public:
  BundleCopy() : path(directory_.path / "model") { fs::copy(kFixture, path, fs::copy_options::recursive); }

  void write(const std::string& name, const std::string& content) const { std::ofstream(path / name, std::ios::binary) << content; }
  std::string read(const std::string& name) const { return bca::bytes::read(path / name); }
  /// Replaces `from`, which must be there, in the manifest.
  void replace(const std::string& from, const std::string& to) const {
    std::string manifest = read("manifest.json");
    const std::size_t at = manifest.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    write("manifest.json", manifest.replace(at, from.size(), to));
  }

 private:
  TemporaryDirectory directory_;

 public:
  fs::path path;
};

/// The message of the Error that the call throws.
template <typename Error, typename Call> std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

#define EXPECT_HAS(text, part) EXPECT_PRED2([](const std::string& a, const std::string& b) { return a.find(b) != std::string::npos; }, text, part)

/// Numbers between -1 and 1 that differ from place to place; the same for the same seed everywhere.
inline void fill(bca::Tensor& tensor, unsigned seed) {
  auto* at = tensor.data<float>();
  std::uint32_t state = seed * 2654435761u + 1;
  for (std::size_t i = 0; i < tensor.count(); ++i) {
    state = state * 1664525u + 1013904223u;
    at[i] = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
  }
}

/// A pair for the fixture's layer: x [batch, x_len, 8], context [batch, context_len, 6].
struct Pair {
  bca::Tensor x, context;

  Pair(std::int64_t batch, std::int64_t x_len, std::int64_t context_len, unsigned seed)
      : x(bca::DType::Float32, {batch, x_len, 8}), context(bca::DType::Float32, {batch, context_len, 6}) {
    fill(x, seed);
    fill(context, seed + 1);
  }
  bca::Inputs inputs() const { return {{"x", x}, {"context", context}}; }
};

inline bool same(const bca::Tensor& a, const bca::Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() && std::memcmp(a.data(), b.data(), a.bytes()) == 0;
}

/// The same result of a float32 model. ONNX Runtime's bits are not fixed: for another alignment it may take another kernel,
/// which sums in another order. The allowance is the one of tests/support/rounding.py.
inline bool near(const bca::Tensor& a, const bca::Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  const float *one = a.data<float>(), *other = b.data<float>();
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < a.count(); ++i) {
    if (!std::isfinite(one[i])) return false;
    worst = std::max(worst, std::abs(static_cast<double>(one[i]) - other[i]));
    largest = std::max(largest, std::abs(static_cast<double>(other[i])));
  }
  return worst <= 28 * 0x1p-24 * largest;
}

}  // namespace support
