#include "engines.hpp"

#include <algorithm>
#include <sstream>

#include "text.hpp"

namespace bca {
namespace {

std::vector<int> numbers(const std::string& version) {
  std::vector<int> found;
  std::istringstream parts(version);
  for (std::string part; std::getline(parts, part, '.');) {
    if (!part.empty() && part.size() < 9 && part.find_first_not_of("0123456789") == std::string::npos) found.push_back(std::stoi(part));
  }
  return found;
}

/// Exactly the version that built it; a version-compatible engine also loads in later ones.
bool loads(const EngineEntry& entry, const std::string& loaded) {
  const std::vector<int> built = numbers(entry.version), here = numbers(loaded);
  return entry.version_compatible ? here >= built : here == built;
}

bool runs(const EngineEntry& entry, const std::string& capability) {
  if (!entry.gpu_capability) return std::find(entry.targets.begin(), entry.targets.end(), capability) != entry.targets.end();
  const std::vector<int> generation = numbers(capability.substr(2));
  if (entry.hardware_compatibility == "ampere_plus") return !generation.empty() && generation[0] >= 80;
  return capability == *entry.gpu_capability;
}

}  // namespace

std::optional<std::string> why_stale(const EngineEntry& entry, const Manifest& manifest, const std::string& loaded,
                                     const std::string& capability) {
  const auto model = manifest.files.find(entry.model);
  if (model == manifest.files.end() || model->second.sha256 != entry.model_sha256) return entry.model + " has changed since it was built";
  if (!loads(entry, loaded)) return "it was built by " + entry.library + " " + entry.version + ", and " + loaded + " is installed";
  if (!runs(entry, capability)) {
    const std::string built_for = entry.targets.empty() ? entry.gpu_capability.value_or("another GPU") : text::join(entry.targets);
    return "it was built for " + built_for + ", and the GPU is " + capability;
  }
  return std::nullopt;
}

void check_has_engine(const Bundle& bundle, const std::string& library, std::optional<Precision> precision) {
  const auto wanted = [&](const EngineEntry& entry) { return entry.library == library && (!precision || entry.precision == *precision); };
  const auto& engines = bundle.manifest.engines;
  if (std::any_of(engines.begin(), engines.end(), wanted)) return;
  const std::string name = precision ? name_of(*precision) : "", here = bundle.directory.string();
  throw EngineError(here + " has no " + library + " engine" + (precision ? " of precision " + name : "") + "; build one: bca build " + here +
                    " --engine " + library + (precision ? " --precision " + name : ""));
}

const EngineEntry& usable_engine(const Bundle& bundle, const std::string& library, const std::string& loaded,
                                 const std::string& capability, std::optional<Precision> precision) {
  check_has_engine(bundle, library, precision);
  std::vector<std::string> reasons;
  for (const EngineEntry& entry : bundle.manifest.engines) {
    if (entry.library != library || (precision && entry.precision != *precision)) continue;
    const auto reason = why_stale(entry, bundle.manifest, loaded, capability);
    if (!reason) return entry;
    reasons.push_back(entry.file + " is stale: " + *reason + "; build it again with bca build, bca inspect shows its options");
  }
  throw EngineError(text::join(reasons, "; "));
}

}  // namespace bca
