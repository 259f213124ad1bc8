// The choice among what this build, this machine and this bundle really have.
#pragma once

#include <memory>
#include <utility>

#include "runner.hpp"

namespace bca {

/// Throws InputError, or the error of the backend asked for: it never falls back. With Auto, EngineError where none works.
std::pair<std::unique_ptr<Runner>, Explanation> choose(const Bundle& bundle, const Options& options);

}  // namespace bca
