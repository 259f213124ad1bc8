// SHA-256 (FIPS 180-4), so that the library needs no cryptography package. Held against NIST's vectors in the tests.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace bca {

class Sha256 {
 public:
  void add(const void* data, std::size_t bytes);
  std::string hex();  // 64 digits; the object is done afterwards

 private:
  void block(const std::uint8_t* data);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> rest_{};
  std::size_t held_ = 0;
  std::uint64_t bytes_ = 0;
};

/// Throws BundleError where the file cannot be read.
std::string sha256_of(const std::filesystem::path& file);

}  // namespace bca
