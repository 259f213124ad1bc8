// The zip format as PKWARE's APPNOTE 6.3 has it: the central directory at the end says where each member is.
#include <zlib.h>

#include "bytes.hpp"
#include "npy.hpp"
#include "text.hpp"

namespace bca::npy {
namespace {

constexpr std::size_t kEndBytes = 22, kEntryBytes = 46, kLocalBytes = 30;
constexpr std::uint32_t kEnd = 0x06054b50, kEntry = 0x02014b50, kLocal = 0x04034b50;
constexpr std::uint64_t kDeflateAtMost = 1032;  // output bytes that one byte of deflate can stand for (zlib's technical notes)

[[noreturn]] void refuse(const std::string& what, const std::string& why) {
  throw InputError(what + " is no readable .npz file: " + why);
}

struct Member {
  std::string name;
  std::uint16_t flags, method;
  std::uint32_t crc, packed, size, offset;
};

std::size_t find_end(std::string_view zip, const std::string& what) {
  if (zip.size() < kEndBytes) refuse(what, "it is too short");
  const std::size_t last = zip.size() - kEndBytes;
  const std::size_t first = last > 0xffff ? last - 0xffff : 0;  // a comment of up to 65,535 bytes may follow
  for (std::size_t at = last + 1; at-- > first;) {
    if (bytes::u32(zip, at) == kEnd) return at;
  }
  refuse(what, "it is not a zip file, or it ends early");
}

Member read_entry(std::string_view zip, std::size_t at, const std::string& what) {
  if (at > zip.size() || zip.size() - at < kEntryBytes || bytes::u32(zip, at) != kEntry) refuse(what, "its directory is damaged");
  const std::size_t length = bytes::u16(zip, at + 28);
  if (zip.size() - at - kEntryBytes < length) refuse(what, "its directory is damaged");
  Member member{std::string(zip.substr(at + kEntryBytes, length)), bytes::u16(zip, at + 8), bytes::u16(zip, at + 10),
                bytes::u32(zip, at + 16), bytes::u32(zip, at + 20), bytes::u32(zip, at + 24), bytes::u32(zip, at + 42)};
  if (member.packed == 0xffffffff || member.size == 0xffffffff || member.offset == 0xffffffff) {
    refuse(what, "it is a zip64 file, for arrays of 4 GiB and more; save smaller arrays");
  }
  return member;
}

std::string_view packed_bytes(std::string_view zip, const Member& member, const std::string& what) {
  const std::size_t at = member.offset;
  if (at > zip.size() || zip.size() - at < kLocalBytes || bytes::u32(zip, at) != kLocal) refuse(what, member.name + " is damaged");
  const std::size_t start = at + kLocalBytes + bytes::u16(zip, at + 26) + bytes::u16(zip, at + 28);
  if (start > zip.size() || zip.size() - start < member.packed) refuse(what, member.name + " ends early");
  return zip.substr(start, member.packed);
}

std::string inflated(std::string_view packed, const Member& member, const std::string& what) {
  if (member.size > kDeflateAtMost * member.packed) refuse(what, member.name + " claims to unpack to more than it can");
  std::string out(member.size, '\0');
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) refuse(what, "zlib does not start");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  const int end = inflate(&stream, Z_FINISH);
  inflateEnd(&stream);
  if (end != Z_STREAM_END || stream.avail_out != 0) refuse(what, member.name + " does not unpack");
  return out;
}

std::string content(std::string_view zip, const Member& member, const std::string& what) {
  if (member.flags & 1) refuse(what, member.name + " is encrypted");
  if (member.method != 0 && member.method != 8) refuse(what, member.name + " is neither stored nor deflated");
  const std::string_view packed = packed_bytes(zip, member, what);
  if (member.method == 0 && member.packed != member.size) refuse(what, member.name + " is damaged");
  std::string found = member.method == 0 ? std::string(packed) : inflated(packed, member, what);
  const auto crc = crc32(0, reinterpret_cast<const Bytef*>(found.data()), static_cast<uInt>(found.size()));
  if (crc != member.crc) refuse(what, member.name + " is damaged: its checksum differs");
  return found;
}

}  // namespace

std::map<std::string, Tensor> parse_npz(std::string_view zip, const std::string& what) {
  const std::size_t end = find_end(zip, what);
  const std::size_t members = bytes::u16(zip, end + 10);
  if (members == 0xffff || bytes::u32(zip, end + 16) == 0xffffffff) refuse(what, "it is a zip64 file; save fewer or smaller arrays");
  std::size_t at = bytes::u32(zip, end + 16);
  std::map<std::string, Tensor> arrays;
  for (std::size_t i = 0; i < members; ++i) {
    const Member member = read_entry(zip, at, what);
    at += kEntryBytes + bytes::u16(zip, at + 28) + bytes::u16(zip, at + 30) + bytes::u16(zip, at + 32);
    std::string name = member.name;
    if (name.size() > 4 && name.substr(name.size() - 4) == ".npy") name.resize(name.size() - 4);
    if (!arrays.emplace(name, parse(content(zip, member, what), what + ":" + member.name)).second) {
      refuse(what, member.name + " is in it twice");
    }
  }
  return arrays;
}

std::map<std::string, Tensor> read_npz(const std::filesystem::path& file) { return parse_npz(bytes::read(file), file.string()); }

}  // namespace bca::npy
