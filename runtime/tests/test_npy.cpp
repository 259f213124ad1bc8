// Files as numpy writes them come in, others are refused; what goes out, numpy reads (tests/runtime/test_runtime.py asks it).
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <zlib.h>

#include "npy.hpp"
#include "support.hpp"

namespace {

using support::message_of;

std::string npy(const std::string& header, const std::string& data, int version = 1) {
  std::string bytes = "\x93NUMPY";
  bytes += static_cast<char>(version);
  bytes += '\0';
  bytes += static_cast<char>(header.size() & 0xff);
  bytes += static_cast<char>(header.size() >> 8);
  if (version > 1) bytes += std::string(2, '\0');
  return bytes + header + data;
}

std::string header(const std::string& descr, const std::string& shape, const std::string& fortran = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }\n";
}

std::string refused(const std::string& bytes) {
  return message_of<bca::InputError>([&] { bca::npy::parse(bytes, "a.npy"); });
}

TEST(Npy, ReadsTypesShapesAndVersions) {
  for (int version : {1, 2, 3}) {
    const bca::Tensor array = bca::npy::parse(npy(header("<f4", "(2, 1)"), std::string("\0\0\x80\x3f\0\0\0\x40", 8), version), "a.npy");
    EXPECT_EQ(array.shape(), (bca::Shape{2, 1}));
    EXPECT_EQ(array.data<float>()[0], 1.0f);
    EXPECT_EQ(array.data<float>()[1], 2.0f);
  }
  EXPECT_EQ(bca::npy::parse(npy(header("|b1", "(3,)"), std::string(3, '\1')), "a.npy").dtype(), bca::DType::Bool);
  EXPECT_EQ(bca::npy::parse(npy(header("<i8", "()"), std::string(8, '\0')), "a.npy").shape(), bca::Shape{});
  EXPECT_EQ(bca::npy::parse(npy(header("<f8", "(0, 4)"), ""), "a.npy").count(), 0u);
}

TEST(Npy, OneAxisInFortranOrderIsTheSameInC) {
  EXPECT_EQ(bca::npy::parse(npy(header("<f4", "(1,)", "True"), std::string(4, '\0')), "a.npy").count(), 1u);
}

TEST(Npy, RefusesWithTheReason) {
  EXPECT_EQ(refused("no"), "a.npy is no readable .npy file: it does not begin with NumPy's signature");
  EXPECT_HAS(refused(npy(header("<f4", "(2,)"), "")), "its data does not have the size of its shape");
  EXPECT_HAS(refused(npy(header("<f4", "(99999999999999, 99999999)"), "")), "more than memory can hold");
  EXPECT_HAS(refused(npy(header("<f4", "(99999999999999999999999,)"), "")), "more than memory can hold");
  EXPECT_HAS(refused(npy(header(">f4", "(1,)"), std::string(4, '\0'))), "its element type '>f4'");
  EXPECT_HAS(refused(npy(header("|O", "(1,)"), std::string(4, '\0'))), "its element type '|O'");
  EXPECT_HAS(refused(npy(header("<f4", "(1, 1)", "True"), std::string(4, '\0'))), "Fortran order; save numpy.ascontiguousarray of it");
  EXPECT_HAS(refused(npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", "")), "records, not numbers");
  EXPECT_HAS(refused(npy("{'descr': '<f4', 'shape': (1,), }", "")), "lacks descr, fortran_order or shape");
  EXPECT_HAS(refused(npy("{'descr': '<f4', 'shape': (-1,), }", "")), "its header is damaged");
  EXPECT_HAS(refused(npy("", "", 9)), "its format is 9");
  EXPECT_HAS(refused(npy(header("<f4", "(1,)"), "").substr(0, 20)), "it ends early");
}

TEST(Npy, WhatIsWrittenIsReadBack) {
  const support::TemporaryDirectory directory;
  bca::Tensor array(bca::DType::Float32, {2, 3, 4});
  support::fill(array, 5);
  bca::npy::write(directory.path / "a.npy", array);
  EXPECT_TRUE(support::same(bca::npy::read(directory.path / "a.npy"), array));
  EXPECT_EQ(std::distance(support::fs::directory_iterator(directory.path), {}), 1);  // nothing partial is left
}

TEST(Npy, AFileThatCannotBeWrittenIsAnError) {
  EXPECT_HAS(message_of<bca::InputError>([] { bca::npy::write("/nowhere/a.npy", bca::Tensor::zeros(bca::DType::Bool, {1})); }), "cannot be written");
}

std::string le(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
  return text;
}

TEST(Npy, WritesIntoAPipeThroughALinkAndLeavesBothInPlace) {
  const support::TemporaryDirectory directory;
  const auto pipe = directory.path / "pipe", link = directory.path / "link";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  support::fs::create_symlink(pipe, link);
  const int reader = open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  const float value = 5;
  for (const auto& target : {pipe, link}) {
    bca::npy::write(target, {&value, {1}});
    char bytes[1000];
    const auto count = read(reader, bytes, sizeof bytes);
    ASSERT_GT(count, 0) << target;
    EXPECT_EQ(bca::npy::parse({bytes, static_cast<std::size_t>(count)}, "pipe").data<float>()[0], 5.0f);
  }
  close(reader);
  EXPECT_TRUE(support::fs::is_fifo(support::fs::symlink_status(pipe)));
  EXPECT_TRUE(support::fs::is_symlink(support::fs::symlink_status(link)));
  EXPECT_EQ(std::distance(support::fs::directory_iterator(directory.path), support::fs::directory_iterator()), 2);
}

struct ZipMember {
  std::string name, content, packed;
  int method = 0, flags = 0;
  std::uint32_t crc = 0, size = 0;

  ZipMember(std::string member, std::string bytes) : name(std::move(member)), content(bytes), packed(std::move(bytes)) {
    crc = static_cast<std::uint32_t>(crc32(0, reinterpret_cast<const Bytef*>(content.data()), static_cast<uInt>(content.size())));
    size = static_cast<std::uint32_t>(content.size());
  }
  void deflate() {
    std::string out(compressBound(size) + 64, '\0');
    z_stream stream{};
    ASSERT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
    stream.next_in = reinterpret_cast<Bytef*>(content.data());
    stream.avail_in = size;
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    ASSERT_EQ(::deflate(&stream, Z_FINISH), Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    packed = out, method = 8;
  }
};

std::string zip(const std::vector<ZipMember>& members) {
  std::string body, directory;
  for (const ZipMember& m : members) {
    const std::string middle = le(m.flags, 2) + le(m.method, 2) + le(0, 4) + le(m.crc, 4) + le(m.packed.size(), 4) + le(m.size, 4) + le(m.name.size(), 2);
    directory += "PK\1\2" + le(20, 2) + le(20, 2) + middle + le(0, 2) + le(0, 2) + le(0, 2) + le(0, 2) + le(0, 4) + le(body.size(), 4) + m.name;
    body += "PK\3\4" + le(20, 2) + middle + le(0, 2) + m.name + m.packed;
  }
  return body + directory + "PK\5\6" + le(0, 4) + le(members.size(), 2) + le(members.size(), 2) + le(directory.size(), 4) + le(body.size(), 4) + le(0, 2);
}

ZipMember member(const std::string& name, float value = 1) {
  std::string data(4, '\0');
  std::memcpy(data.data(), &value, 4);
  return {name, npy(header("<f4", "(1,)"), data)};
}

std::string npz_refused(const std::string& bytes) {
  return message_of<bca::InputError>([&] { bca::npy::parse_npz(bytes, "a.npz"); });
}

TEST(Npz, ReadsStoredAndDeflatedMembers) {
  ZipMember deflated = member("case/b.npy", 2);
  deflated.deflate();
  const auto arrays = bca::npy::parse_npz(zip({member("a.npy", 1), deflated}), "a.npz");
  ASSERT_EQ(arrays.size(), 2u);
  EXPECT_EQ(arrays.at("a").data<float>()[0], 1.0f);
  EXPECT_EQ(arrays.at("case/b").data<float>()[0], 2.0f);
}

TEST(Npz, ReadsTheBundlesOwn) {
  const auto arrays = bca::npy::read_npz(support::kFixture / "selftest.npz");
  EXPECT_EQ(arrays.at("fp32/no-mask/output/out").dtype(), bca::DType::Float64);
  EXPECT_EQ(arrays.at("fp32/no-mask/input/mask").dtype(), bca::DType::Bool);
}

TEST(Npz, RefusesWithTheReason) {
  EXPECT_HAS(npz_refused("PK"), "it is too short");
  EXPECT_HAS(npz_refused(std::string(100, 'x')), "it is not a zip file");
  ZipMember damaged = member("a.npy");
  damaged.packed.back() ^= 1;
  EXPECT_HAS(npz_refused(zip({damaged})), "a.npy is damaged: its checksum differs");
  ZipMember secret = member("a.npy");
  secret.flags = 1;
  EXPECT_HAS(npz_refused(zip({secret})), "a.npy is encrypted");
  ZipMember other = member("a.npy");
  other.method = 12;
  EXPECT_HAS(npz_refused(zip({other})), "neither stored nor deflated");
  ZipMember big = member("a.npy");
  big.size = 0xffffffff;
  EXPECT_HAS(npz_refused(zip({big})), "it is a zip64 file");
  ZipMember bomb = member("a.npy");
  bomb.deflate();
  bomb.size = 0xfffffff0;
  EXPECT_HAS(npz_refused(zip({bomb})), "claims to unpack to more than it can");
  EXPECT_HAS(npz_refused(zip({member("a.npy"), member("a.npy")})), "a.npy is in it twice");
}

TEST(Npz, AnyCutIsRefusedAndReadsNothingOutside) {
  const std::string whole = zip({member("a.npy")});
  for (std::size_t length = 0; length < whole.size(); ++length) EXPECT_NE(npz_refused(whole.substr(0, length)), "no error") << length;
}

}  // namespace
