// The bundle's manifest, format 1: the parts that a runtime needs. Fields that it does not use are not looked at.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "signature.hpp"

namespace bca {

struct FileEntry {
  std::int64_t bytes = 0;
  std::string sha256;
};

struct ModelEntry {
  std::string file, runtime;
  Precision precision = Precision::Fp32;
  bool keep_io_types = true;                    // else floating-point inputs and outputs have the precision's type
};

struct EngineEntry {
  std::string file, library, version, model, model_sha256;
  Precision precision = Precision::Fp32;
  std::vector<std::string> targets;
  std::optional<std::string> gpu_capability;    // where it was built on the GPU that it is for
  std::vector<Dims> profiles;                   // at least one
  bool version_compatible = false;
  std::string hardware_compatibility = "none";
};

struct Manifest {
  Trust trust = Trust::OnTrust;
  std::map<std::string, std::string> left_out;  // of the bare layer, each with the option of bca-export that decides about it
  Signature signature;
  std::vector<ModelEntry> models;               // at least one
  std::vector<EngineEntry> engines;
  std::map<std::string, FileEntry> files;       // every model and engine is among them
};

/// Parses manifest.json. `shown` names the bundle, `path` the file, in errors. Throws BundleError.
Manifest parse_manifest(const std::string& text, const std::string& shown, const std::string& path);

/// What a model takes and gives, in its own element types.
Signature signature_of(const Manifest& manifest, const ModelEntry& model);

/// What an engine takes and gives, within its profiles: that of the model it was compiled from. Throws BundleError where the
/// manifest has no such model.
Signature signature_of(const Manifest& manifest, const EngineEntry& engine);

/// What Session::describe returns.
std::string to_json(const Session& session);

}  // namespace bca
