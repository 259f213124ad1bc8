// libFuzzer: any bytes as manifest.json are a manifest or a BundleError.
#include <cstddef>
#include <cstdint>

#include "manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string text(reinterpret_cast<const char*>(data), size);
    if (bca::parse_manifest(text, "bundle", "manifest.json").models.empty()) __builtin_trap();
  } catch (const bca::BundleError&) {
  }
  return 0;
}
