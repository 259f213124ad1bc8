// Which of a bundle's engines may be used here. What is stale is refused, in the words of the Python package's engines/build.py.
#pragma once

#include <optional>
#include <string>

#include "bundle.hpp"

namespace bca {

/// Returns why the engine must not be used, or nothing. `loaded`: version of the library here, such as 10.14.1.48;
/// `capability`: of the GPU here, such as sm89.
std::optional<std::string> why_stale(const EngineEntry& entry, const Manifest& manifest, const std::string& loaded,
                                     const std::string& capability);

/// Returns the engine for a library ("tensorrt" or "rtx") and a GPU. Throws EngineError where there is none,
/// with each reason.
const EngineEntry& usable_engine(const Bundle& bundle, const std::string& library, const std::string& loaded,
                                 const std::string& capability, std::optional<Precision> precision);

/// Throws EngineError where the bundle has no engine of that library, and of that precision where one is asked for.
void check_has_engine(const Bundle& bundle, const std::string& library, std::optional<Precision> precision);

}  // namespace bca
