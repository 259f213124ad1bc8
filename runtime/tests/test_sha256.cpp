// NIST's examples for SHA-256 (FIPS 180-4 examples, and the Secure Hashing test vectors).
#include <gtest/gtest.h>

#include "sha256.hpp"
#include "support.hpp"

namespace {

std::string hash(const std::string& text) {
  bca::Sha256 sha;
  sha.add(text.data(), text.size());
  return sha.hex();
}

TEST(Sha256, GivesNistsDigests) {
  EXPECT_EQ(hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hash(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, IsTheSameHoweverTheDataIsCut) {
  const std::string text(1000, 'q');
  for (std::size_t step : {1u, 7u, 63u, 64u, 65u, 128u}) {
    bca::Sha256 sha;
    for (std::size_t at = 0; at < text.size(); at += step) sha.add(text.data() + at, std::min(step, text.size() - at));
    EXPECT_EQ(sha.hex(), hash(text)) << step;
  }
}

TEST(Sha256, OfAFileIsThatOfItsBytes) {
  const support::TemporaryDirectory directory;
  const std::string text(200'000, 'z');
  std::ofstream(directory.path / "file", std::ios::binary) << text;
  EXPECT_EQ(bca::sha256_of(directory.path / "file"), hash(text));
}

}  // namespace
