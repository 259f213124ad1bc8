// The bundle's manifest, format 1: the parts that a runtime needs. Fields that it does not use are not looked at.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bca/session.hpp"

namespace bca {

struct FileEntry {
  std::int64_t bytes = 0;
  std::string sha256;
};

struct ModelEntry {
  std::string file, runtime;
  Precision precision = Precision::Fp32;
  std::vector<TensorInfo> inputs, outputs;
};

struct EngineEntry {
  std::string file, library, version, model, model_sha256;
  Precision precision = Precision::Fp32;
  std::vector<std::string> targets;
  std::optional<std::string> gpu_capability;    // where it was built on the GPU that it is for
  std::vector<Dims> profiles;
  std::vector<TensorInfo> inputs, outputs;
  bool version_compatible = false;
  std::string hardware_compatibility = "none";
};

struct Manifest {
  Dims dims;
  std::vector<ModelEntry> models;               // at least one
  std::vector<EngineEntry> engines;
  std::map<std::string, FileEntry> files;       // every model and engine is among them
};

/// Parses manifest.json. `shown` names the bundle, `path` the file, in errors. Throws BundleError.
Manifest parse_manifest(const std::string& text, const std::string& shown, const std::string& path);

/// What Session::describe returns.
std::string to_json(const Session& session);

}  // namespace bca
