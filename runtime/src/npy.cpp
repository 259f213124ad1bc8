#include "npy.hpp"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <optional>

#include "bytes.hpp"
#include "text.hpp"

namespace bca::npy {
namespace {

// NumPy's type codes, in the order of DType (numpy.lib.format); bfloat16 has none.
constexpr const char* kCodes[] = {"<f4", "<f2", "<V2", "<f8", "|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8"};

[[noreturn]] void refuse(const std::string& what, const std::string& why) {
  throw InputError(what + " is no readable .npy file: " + why);
}

/// Reads the header, a Python dictionary of three known keys.
class Header {
 public:
  Header(std::string_view text, std::string what) : text_(text), what_(std::move(what)) {
    need('{');
    while (!take('}')) {
      entry();
      if (!take(',') && peek() != '}') refuse(what_, "its header is damaged");
    }
    if (!code || !fortran || !shape) refuse(what_, "its header lacks descr, fortran_order or shape");
  }

  std::optional<std::string> code;
  std::optional<bool> fortran;
  std::optional<Shape> shape;

 private:
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }
  void need(char wanted) {
    if (!take(wanted)) refuse(what_, "its header is damaged");
  }
  std::string string() {
    need('\'');
    const std::size_t end = text_.find('\'', at_);
    if (end == std::string_view::npos) refuse(what_, "its header is damaged");
    std::string found(text_.substr(at_, end - at_));
    at_ = end + 1;
    return found;
  }
  bool boolean() {
    for (const bool value : {true, false}) {
      const std::string_view word = value ? "True" : "False";
      if (peek() == word[0] && text_.substr(at_, word.size()) == word) return at_ += word.size(), value;
    }
    refuse(what_, "its header is damaged");
  }
  std::int64_t size() {
    std::int64_t value = 0;
    if (peek() < '0' || peek() > '9') refuse(what_, "its header is damaged");
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      if (value > (std::int64_t{1} << 58)) refuse(what_, "a size in its header is more than memory can hold");
      value = 10 * value + (text_[at_] - '0');
    }
    return value;
  }
  Shape sizes() {
    Shape found;
    need('(');
    while (!take(')')) {
      found.push_back(size());
      if (!take(',') && peek() != ')') refuse(what_, "its header is damaged");
    }
    return found;
  }
  void entry() {
    const std::string key = string();
    need(':');
    if (key == "descr") {
      if (peek() != '\'') refuse(what_, "it holds records, not numbers");
      code = string();
    } else if (key == "fortran_order") {
      fortran = boolean();
    } else if (key == "shape") {
      shape = sizes();
    } else {
      refuse(what_, "its header has an unknown key " + text::quoted(key));
    }
  }

  std::string_view text_;
  std::string what_;
  std::size_t at_ = 0;
};

DType type_of(const std::string& code, const std::string& what) {
  for (std::size_t i = 0; i < std::size(kCodes); ++i) {
    if (code == kCodes[i] && static_cast<DType>(i) != DType::BFloat16) return static_cast<DType>(i);
  }
  refuse(what, "its element type " + text::quoted(code) + " is not one of little-endian floats, integers and bool");
}

/// Returns where the header's text begins and how long it is.
std::pair<std::size_t, std::size_t> header_place(std::string_view bytes, const std::string& what) {
  if (bytes.size() < 10 || bytes.substr(0, 6) != "\x93NUMPY") refuse(what, "it does not begin with NumPy's signature");
  const int version = static_cast<unsigned char>(bytes[6]);
  if (version < 1 || version > 3) refuse(what, "its format is " + std::to_string(version) + ", and 1 to 3 are known");
  if (version == 1) return {10, bytes::u16(bytes, 8)};
  if (bytes.size() < 12) refuse(what, "it ends early");
  return {12, bytes::u32(bytes, 8)};
}

std::string header_for(const View& array) {
  std::string shape;
  for (const std::int64_t size : array.shape) shape += std::to_string(size) + ", ";
  std::string header = std::string("{'descr': '") + kCodes[static_cast<int>(array.dtype)] + "', 'fortran_order': False, 'shape': (" +
                       shape + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');  // the data begins at a multiple of 64
  return header + "\n";
}

/// A link is not: /dev/stdout is one, and its name must stay what it is.
bool is_replaced(const std::filesystem::path& file) {
  std::error_code ignored;
  const auto status = std::filesystem::symlink_status(file, ignored);
  return !std::filesystem::exists(status) || std::filesystem::is_regular_file(status);
}

bool write_to(const std::filesystem::path& file, const View& array) {
  const std::string header = header_for(array);
  std::ofstream stream(file, std::ios::binary);
  stream << "\x93NUMPY" << '\x01' << '\x00' << static_cast<char>(header.size() & 0xff) << static_cast<char>(header.size() >> 8) << header;
  stream.write(static_cast<const char*>(array.data), static_cast<std::streamsize>(count_of(array.shape) * size_of(array.dtype)));
  stream.close();
  return static_cast<bool>(stream);
}

bool replace(const std::filesystem::path& file, const View& array) {
  std::filesystem::path partial = file;
  partial += "." + std::to_string(::getpid()) + ".part";
  std::error_code error;
  const bool written = write_to(partial, array);
  if (written) std::filesystem::rename(partial, file, error);
  if (written && !error) return true;
  std::filesystem::remove(partial, error);
  return false;
}

}  // namespace

Tensor parse(std::string_view bytes, const std::string& what) {
  const auto [start, length] = header_place(bytes, what);
  if (bytes.size() - start < length) refuse(what, "it ends early");
  const Header header(bytes.substr(start, length), what);
  if (*header.fortran && header.shape->size() > 1) refuse(what, "it is in Fortran order; save numpy.ascontiguousarray of it");
  const DType dtype = type_of(*header.code, what);
  const std::string_view data = bytes.substr(start + length);
  // Compared before memory is asked for: a damaged header may claim any size.
  if (count_of(*header.shape) * size_of(dtype) != data.size()) refuse(what, "its data does not have the size of its shape");
  Tensor array(dtype, *header.shape);
  if (!data.empty()) std::memcpy(array.data(), data.data(), data.size());
  return array;
}

Tensor read(const std::filesystem::path& file) { return parse(bytes::read(file), file.string()); }

void write(const std::filesystem::path& file, const View& array) {
  const bool written = is_replaced(file) ? replace(file, array) : write_to(file, array);
  if (!written) throw InputError(file.string() + " cannot be written; check the directory, its permissions and the disk's free space");
}

}  // namespace bca::npy
