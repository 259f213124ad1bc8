// libFuzzer: any bytes as .npy and as .npz are arrays whose memory has the size of their shape, or an InputError.
#include <cstddef>
#include <cstdint>

#include "npy.hpp"

namespace {

void read_through(const bca::Tensor& array) {
  const auto* bytes = static_cast<const unsigned char*>(array.data());
  unsigned sum = 0;
  for (std::size_t i = 0; i < array.bytes(); ++i) sum += bytes[i];
  volatile unsigned kept = sum;  // so that the reading is not optimised away
  static_cast<void>(kept);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    read_through(bca::npy::parse(bytes, "fuzz"));
  } catch (const bca::InputError&) {
  }
  try {
    for (const auto& [name, array] : bca::npy::parse_npz(bytes, "fuzz")) read_through(array);
  } catch (const bca::InputError&) {
  }
  return 0;
}
