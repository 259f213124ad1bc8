// An ONNX Runtime of a few functions, for ThreadSanitizer, which sees through the real one as little as through any other
// library that was not compiled with it. Its "model" gives out = 2x and context_out = 3context where masks are all true.
// $FAKE_ORT_CUDA: it has the CUDA provider too. $FAKE_ORT_LOG: a file that gets a line for each option of a session and for
// each call. $FAKE_ORT_HOLD: while this file is there, no call ends.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_c_api.h>

struct OrtStatus {
  std::string message;
};
struct OrtEnv {};
struct OrtMemoryInfo {};
struct OrtSessionOptions {};
struct OrtCUDAProviderOptionsV2 {};
struct OrtSession {
  std::string text;
  std::atomic<long> calls{0};
};
struct OrtValue {
  float* data;
  std::size_t bytes;
};

namespace {

OrtStatus* fail(const std::string& message) { return new OrtStatus{message}; }

OrtStatus* note(const std::string& line) {
  if (const char* file = std::getenv("FAKE_ORT_LOG")) std::ofstream(file, std::ios::app) << line << "\n";
  return nullptr;
}

void wait_while_held() {
  const char* file = std::getenv("FAKE_ORT_HOLD");
  while (file && std::ifstream(file)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

OrtStatus* scale(const OrtValue* from, OrtValue* to, float factor) {
  if (from->bytes != to->bytes) return fail("sizes differ");
  for (std::size_t i = 0; i < from->bytes / sizeof(float); ++i) to->data[i] = factor * from->data[i];
  return nullptr;
}

OrtStatus* run(OrtSession* session, const OrtRunOptions*, const char* const* names, const OrtValue* const* inputs, size_t count,
               const char* const* output_names, size_t output_count, OrtValue** outputs) noexcept {
  ++session->calls;
  note("call");
  wait_while_held();
  if (session->text == "fails") return fail("the fake was told to\nand more");
  std::map<std::string, const OrtValue*> given;
  for (size_t i = 0; i < count; ++i) given[names[i]] = inputs[i];
  for (size_t i = 0; i < output_count; ++i) {
    const bool out = std::strcmp(output_names[i], "out") == 0;
    if (OrtStatus* status = scale(given.at(out ? "x" : "context"), outputs[i], out ? 2.0f : 3.0f)) return status;
  }
  return nullptr;
}

OrtStatus* open_session(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession** session) noexcept {
  std::ifstream file(path);
  *session = new OrtSession;
  std::getline(file, (*session)->text);
  if ((*session)->text != "does not open") return nullptr;
  delete *session;
  return fail("the fake was told to");
}

OrtStatus* providers(char*** names, int* count) noexcept {
  static char cpu[] = "CPUExecutionProvider", cuda[] = "CUDAExecutionProvider";
  *names = new char*[2]{cpu, cuda};
  *count = std::getenv("FAKE_ORT_CUDA") ? 2 : 1;
  return nullptr;
}

void add_cuda(OrtApi& api) {
  api.CreateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2** made) noexcept -> OrtStatus* { return *made = new OrtCUDAProviderOptionsV2, nullptr; };
  api.ReleaseCUDAProviderOptions = [](OrtCUDAProviderOptionsV2* made) noexcept { delete made; };
  api.UpdateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values, size_t count) noexcept -> OrtStatus* {
    for (size_t i = 0; i < count; ++i) note(std::string(keys[i]) + " " + values[i]);
    return nullptr;
  };
  api.SessionOptionsAppendExecutionProvider_CUDA_V2 = [](OrtSessionOptions*, const OrtCUDAProviderOptionsV2*) noexcept { return note("on CUDA"); };
}

OrtApi make_api() {
  OrtApi api{};
  api.GetErrorMessage = [](const OrtStatus* status) noexcept { return status->message.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) noexcept { delete status; };
  api.CreateEnv = [](OrtLoggingLevel, const char*, OrtEnv** env) noexcept -> OrtStatus* { return *env = new OrtEnv, nullptr; };
  api.ReleaseEnv = [](OrtEnv* env) noexcept { delete env; };
  api.CreateCpuMemoryInfo = [](OrtAllocatorType, OrtMemType, OrtMemoryInfo** info) noexcept -> OrtStatus* { return *info = new OrtMemoryInfo, nullptr; };
  api.ReleaseMemoryInfo = [](OrtMemoryInfo* info) noexcept { delete info; };
  api.CreateSessionOptions = [](OrtSessionOptions** options) noexcept -> OrtStatus* { return *options = new OrtSessionOptions, nullptr; };
  api.ReleaseSessionOptions = [](OrtSessionOptions* options) noexcept { delete options; };
  api.SetIntraOpNumThreads = [](OrtSessionOptions*, int threads) noexcept { return note("threads " + std::to_string(threads)); };
  api.SetSessionLogSeverityLevel = [](OrtSessionOptions*, int) noexcept -> OrtStatus* { return nullptr; };
  api.AddSessionConfigEntry = [](OrtSessionOptions*, const char* key, const char* value) noexcept { return note(std::string(key) + " " + value); };
  api.GetAvailableProviders = providers;
  api.ReleaseAvailableProviders = [](char** names, int) noexcept -> OrtStatus* { return delete[] names, nullptr; };
  api.CreateSession = open_session;
  api.ReleaseSession = [](OrtSession* session) noexcept { delete session; };
  api.CreateTensorWithDataAsOrtValue = [](const OrtMemoryInfo*, void* data, size_t bytes, const int64_t*, size_t, ONNXTensorElementDataType,
                                          OrtValue** value) noexcept -> OrtStatus* { return *value = new OrtValue{static_cast<float*>(data), bytes}, nullptr; };
  api.ReleaseValue = [](OrtValue* value) noexcept { delete value; };
  api.Run = run;
  add_cuda(api);
  return api;
}

const OrtApi* get_api(uint32_t wanted) noexcept {
  static const OrtApi api = make_api();
  const char* newest = std::getenv("FAKE_ORT_API");
  return newest && std::strtoul(newest, nullptr, 10) < wanted ? nullptr : &api;
}

const char* version() noexcept { return "1.0.fake"; }

}  // namespace

extern "C" __attribute__((visibility("default"))) const OrtApiBase* OrtGetApiBase() noexcept {
  static const OrtApiBase base = {get_api, version};
  return &base;
}
