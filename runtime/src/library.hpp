// Shared libraries that are opened at run time.
#pragma once

#include <dlfcn.h>

#include <string>
#include <vector>

#include "bca/errors.hpp"

namespace bca {

/// Opens the first that loads. Never unloaded: such libraries have threads and thread-local data of their own.
/// Throws MissingDependencyError: `what` does not load, each reason, and `advice`.
inline void* open_library(const std::string& what, const std::vector<std::string>& candidates, const std::string& advice) {
  std::string reasons;
  for (const std::string& candidate : candidates) {
    if (void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) return handle;
    reasons += (reasons.empty() ? "" : "; ") + std::string(dlerror());
  }
  throw MissingDependencyError(what + " does not load (" + reasons + "); " + advice);
}

/// Returns a function of the library. `Function` is a pointer to function. Throws MissingDependencyError.
template <typename Function> Function function_of(void* handle, const std::string& what, const char* name) {
  if (void* found = dlsym(handle, name)) return reinterpret_cast<Function>(found);
  throw MissingDependencyError("the library given as " + what + " is not that: it has no " + name + "; give the right file");
}

}  // namespace bca
