// ONNX Runtime, opened at run time: one binary serves every version from 1.18 on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_c_api.h>

namespace bca {

class OrtLibrary {
 public:
  /// Empty: $BCA_ORT_LIBRARY, then libonnxruntime.so.1 and libonnxruntime.so of the loader's path.
  /// Throws MissingDependencyError.
  static std::shared_ptr<OrtLibrary> open(const std::string& path);
  ~OrtLibrary();
  OrtLibrary(const OrtLibrary&) = delete;
  OrtLibrary& operator=(const OrtLibrary&) = delete;

  /// Throws EngineError with the first line of the library's message, after `what`.
  void check(OrtStatus* status, const std::string& what) const;
  std::vector<std::string> providers() const;

  const OrtApi* api = nullptr;
  std::string version;
  OrtEnv* env = nullptr;

 private:
  explicit OrtLibrary(void* handle);
};

/// An object of the library, freed by the library.
template <typename T> using OrtPtr = std::unique_ptr<T, void (*)(T*)>;

}  // namespace bca
