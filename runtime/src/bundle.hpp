// Open a bundle's directory, and refuse one that is damaged, unsafe or too new.
#pragma once

#include <filesystem>
#include <string>

#include "manifest.hpp"

namespace bca {

struct Bundle {
  std::filesystem::path directory;
  Manifest manifest;

  /// The path of a file that the manifest lists. Throws BundleError.
  std::filesystem::path path(const std::string& name) const;
};

/// Throws BundleError: not a bundle, damaged (the file is named), unsafe, or of a newer format.
Bundle open_bundle(const std::filesystem::path& directory, Verify verify);

}  // namespace bca
