#include "bundle.hpp"

#include <algorithm>

#include "bytes.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace bca {
namespace {

namespace fs = std::filesystem;

// Bytes of one part of a path, and of all of it, beyond which no file system has it.
constexpr std::size_t kLongestName = 255, kLongestPath = 4096;

/// A name as errors show it: of a long one the beginning, and how long it is.
std::string shortened(const std::string& name) {
  return name.size() <= kLongestName ? name : name.substr(0, 40) + "... (" + std::to_string(name.size()) + " characters)";
}

bool is_inside(const fs::path& file, const fs::path& directory) {
  const fs::path root = fs::weakly_canonical(directory), full = fs::weakly_canonical(file);
  if (root.empty()) return false;  // every path begins with nothing
  auto at = full.begin();
  for (const fs::path& part : root) {
    if (at == full.end() || *at++ != part) return false;
  }
  return true;
}

fs::path safe_path(const fs::path& directory, const std::string& name) {
  bool named = false, climbs = false, fits = name.size() <= kLongestPath;
  for (const fs::path& part : fs::path(name)) {
    fits &= part.native().size() <= kLongestName;
    named |= !part.empty() && part != ".";
    climbs |= part == "..";
  }
  if (!fits) throw BundleError("no system has a file named " + shortened(name) + "; do not use this bundle");
  if (!named || climbs || name[0] == '/' || name.find('\\') != std::string::npos || name.find('\0') != std::string::npos) {
    throw BundleError("unsafe path " + text::quoted(name) +
                      ": files of a bundle are named relative to it, without '..'; do not use this bundle");
  }
  if (!is_inside(directory / name, directory)) {
    throw BundleError("unsafe path " + text::quoted(name) + ": it is a link that leads out of the bundle; do not use this bundle, or if you know " +
                      "where its links lead, copy it with the files in their places: cp -rL");
  }
  return directory / name;
}

/// What to do about a folder that is no bundle: the bundle may be below it or above it.
std::string way_to_one(const fs::path& directory) {
  const fs::path plain = directory.has_filename() ? directory : directory.parent_path();
  std::vector<std::string> inside;
  if (fs::is_directory(plain)) {
    for (const auto& entry : fs::directory_iterator(plain)) {
      if (fs::is_regular_file(entry.path() / "manifest.json")) inside.push_back(entry.path().string());
    }
  }
  std::sort(inside.begin(), inside.end());
  if (inside.size() > 8) inside.resize(8);
  if (!inside.empty()) return "bundles are in it: " + text::join(inside);
  if (fs::is_regular_file(plain.parent_path() / "manifest.json")) return "it is in the bundle " + plain.parent_path().string();
  const bool taken = fs::is_directory(plain) && !fs::is_empty(plain);  // --out takes no other folder
  return "make one with bca-export --out " + (taken ? plain / "model" : plain).string();
}

Manifest read_manifest_file(const fs::path& directory) {
  const fs::path file = directory / "manifest.json";
  if (!fs::is_regular_file(file)) {
    throw BundleError(directory.string() + " is not a bundle: it has no manifest.json; " + way_to_one(directory));
  }
  try {
    return parse_manifest(bytes::read(safe_path(directory, "manifest.json")), directory.string(), file.string());
  } catch (const InputError& error) {  // the file's permissions
    throw BundleError(error.what());
  }
}

void check_file(const fs::path& directory, const std::string& name, const FileEntry& entry, Verify verify) {
  const fs::path file = safe_path(directory, name);
  if (!fs::is_regular_file(file)) {
    throw BundleError(name + " is missing from " + directory.string() + "; copy or export the bundle again");
  }
  if (verify == Verify::Off) return;
  const auto size = static_cast<std::int64_t>(fs::file_size(file));
  if (size != entry.bytes) {
    throw BundleError(name + " has " + std::to_string(size) + " bytes, the manifest says " + std::to_string(entry.bytes) +
                      "; copy or export the bundle again");
  }
  if (verify == Verify::Full && sha256_of(file) != entry.sha256) {
    throw BundleError(name + " has changed since the export (its sha256 differs from the manifest's); export the bundle again");
  }
}

Bundle open_checked(const fs::path& directory, Verify verify) {
  Bundle bundle{directory, read_manifest_file(directory)};
  for (const auto& [name, entry] : bundle.manifest.files) check_file(directory, name, entry, verify);
  return bundle;
}

}  // namespace

fs::path Bundle::path(const std::string& name) const {
  if (manifest.files.count(name)) return directory / name;
  std::vector<std::string> known;
  for (const auto& [file, entry] : manifest.files) known.push_back(file);
  throw BundleError("the bundle has no " + shortened(name) + "; it has " + text::join(known));
}

Bundle open_bundle(const fs::path& directory, Verify verify) {
  if (directory.empty()) throw BundleError("the bundle's path is empty; give its directory, '.' for this one");
  std::error_code ignored;
  if (fs::is_regular_file(directory, ignored)) {
    throw BundleError(directory.string() + " is a file, and this runtime opens directories; unpack it first: unzip " +
                      directory.string() + " -d DIRECTORY");
  }
  try {
    return open_checked(directory, verify);
  } catch (const fs::filesystem_error& error) {
    const fs::path& place = error.path1().empty() ? directory : error.path1();
    throw BundleError(place.string() + " cannot be read: " + error.code().message() + "; check its permissions and links");
  }
}

}  // namespace bca
