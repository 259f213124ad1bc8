#include "ort_library.hpp"

#include <cstdlib>
#include <mutex>

#include "library.hpp"

namespace bca {
namespace {

// The oldest version that reads the models of a bundle (ONNX IR 10); a newer library still serves its functions.
constexpr std::uint32_t kApiVersion = 18;

// onnxruntime's environments share one logger, which it destroys after its own lock: another one made meanwhile fails.
std::mutex& environments() {
  static std::mutex mutex;
  return mutex;
}

std::vector<std::string> places(const std::string& path) {
  if (!path.empty()) return {path};
  const char* from_environment = std::getenv("BCA_ORT_LIBRARY");
  if (from_environment && *from_environment) return {from_environment};
  return {"libonnxruntime.so.1", "libonnxruntime.so"};
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

std::shared_ptr<OrtLibrary> OrtLibrary::open(const std::string& path) {
  void* handle = open_library("onnxruntime", places(path), "give its libonnxruntime.so in Options.onnxruntime_library or BCA_ORT_LIBRARY");
  return std::shared_ptr<OrtLibrary>(new OrtLibrary(handle));
}

OrtLibrary::OrtLibrary(void* handle) {
  const auto get = function_of<const OrtApiBase* (*)()>(handle, "onnxruntime", "OrtGetApiBase");
  version = get()->GetVersionString();
  api = get()->GetApi(kApiVersion);
  if (!api) throw MissingDependencyError("onnxruntime " + version + " is too old; version 1." + std::to_string(kApiVersion) + " or later is needed");
  const std::lock_guard lock(environments());
  check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "bca", &env), "onnxruntime does not start");
}

OrtLibrary::~OrtLibrary() {
  const std::lock_guard lock(environments());
  api->ReleaseEnv(env);
}

void OrtLibrary::check(OrtStatus* status, const std::string& what) const {
  if (!status) return;
  const OrtPtr<OrtStatus> owner(status, api->ReleaseStatus);
  throw EngineError(what + ": " + first_line(api->GetErrorMessage(status)));
}

std::vector<std::string> OrtLibrary::providers() const {
  char** names = nullptr;
  int count = 0;
  check(api->GetAvailableProviders(&names, &count), "onnxruntime does not list its providers");
  const std::vector<std::string> found(names, names + count);
  check(api->ReleaseAvailableProviders(names, count), "onnxruntime does not free its list of providers");
  return found;
}

}  // namespace bca
