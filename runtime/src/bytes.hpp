// Little-endian numbers in a buffer, and whole files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "bca/errors.hpp"

namespace bca::bytes {

/// The caller has made sure that `at + 2` (or 4) bytes are there.
inline std::uint16_t u16(std::string_view data, std::size_t at) {
  return static_cast<std::uint16_t>(static_cast<unsigned char>(data[at]) | static_cast<unsigned char>(data[at + 1]) << 8);
}

inline std::uint32_t u32(std::string_view data, std::size_t at) {
  return u16(data, at) | static_cast<std::uint32_t>(u16(data, at + 2)) << 16;
}

/// Throws InputError.
inline std::string read(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string content;
  if (stream && std::filesystem::is_regular_file(file)) {
    content.resize(std::filesystem::file_size(file));
    stream.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (stream) return content;
  }
  throw InputError(file.string() + " does not exist or cannot be read as a file; check the path");
}

}  // namespace bca::bytes
