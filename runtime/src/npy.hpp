// NumPy's files: .npy (format 1 to 3, C order, little-endian) and .npz (a zip, stored or deflated).
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "bca/tensor.hpp"

namespace bca::npy {

/// Parses a .npy file's bytes. `what` names it in errors. Throws InputError.
Tensor parse(std::string_view bytes, const std::string& what);

/// Parses a .npz file's bytes: arrays by name, without the ".npy". Throws InputError; zip64 and encryption are refused.
std::map<std::string, Tensor> parse_npz(std::string_view bytes, const std::string& what);

Tensor read(const std::filesystem::path& file);
std::map<std::string, Tensor> read_npz(const std::filesystem::path& file);

/// Writes beside the target and renames, so that a reader sees the old file or the whole new one; straight into what is there
/// and no regular file, such as /dev/stdout, a pipe or a link. bfloat16, which numpy
/// has no name for, goes out as raw pairs of bytes.
void write(const std::filesystem::path& file, const View& array);

}  // namespace bca::npy
