// TensorRT 10 or 11, or TensorRT-RTX: which of them depends on the headers this is compiled with (BCA_RTX for the latter).
#pragma once

#include <memory>

#include "runner.hpp"

namespace bca {

/// Opens the bundle's engine for this library and this GPU. Throws EngineError, InputError, MissingDependencyError.
std::unique_ptr<Runner> open_engine(const Bundle& bundle, const Options& options);

}  // namespace bca
