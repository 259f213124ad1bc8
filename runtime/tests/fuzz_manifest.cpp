// libFuzzer: any bytes as manifest.json are a manifest or a BundleError, and the outputs of a manifest have sizes or an InputError.
#include <cstddef>
#include <cstdint>

#include "manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string text(reinterpret_cast<const char*>(data), size);
    const bca::Manifest manifest = bca::parse_manifest(text, "bundle", "manifest.json");
    if (manifest.models.empty()) __builtin_trap();
    bca::Sizes sizes;
    for (const auto& [name, range] : manifest.signature.dims) sizes[name] = range.opt;
    for (const bca::TensorInfo& tensor : manifest.signature.outputs) bca::shape_at(tensor.axes, sizes);
  } catch (const bca::BundleError&) {
  } catch (const bca::InputError&) {
  }
  return 0;
}
