// A TensorRT of a few functions behind the real headers: a shared library that the runtime opens like the real one. Its plan is
// text: "fake engine", then words that tell it what to do. It gives out = 2x where the mask is true, and context_out = 3context.
#include <cuda_runtime_api.h>

#include <map>
#include <sstream>
#include <string>

#include "unused.hpp"

namespace {

using namespace nvinfer1;

ILogger* logger = nullptr;

bool refuse(const char* why) {
  logger->log(ILogger::Severity::kERROR, why);
  return false;
}

int current_device() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}

Dims dims(int batch, int length, int features) {
  Dims made{};
  made.nbDims = features ? 3 : 2;
  made.d[0] = batch, made.d[1] = length, made.d[2] = features;
  return made;
}

int features_of(const std::string& name) { return name.find("mask") != std::string::npos ? 0 : name == "x" || name == "out" ? 8 : 6; }

/// Profile 0 is for lengths up to 8, profile 1 for 4 to 16.
Dims bound(const std::string& name, int profile, OptProfileSelector which) {
  const int lengths[2][3] = {{1, 4, 8}, {4, 12, 16}}, batches[3] = {1, 2, 4};
  return dims(batches[static_cast<int>(which)], lengths[profile][static_cast<int>(which)], features_of(name));
}

class FakeContext : public IExecutionContext, UnusedVExecutionContext {
 public:
  explicit FakeContext(std::string words) : words_(std::move(words)) { mImpl = this; }

  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) noexcept override { return profile_ = profile, true; }
  bool setInputShape(const char* name, const Dims& shape) noexcept override {
    for (int i = 0; i < shape.nbDims; ++i) {
      const bool fits = profile_ >= 0 && shape.d[i] >= bound(name, profile_, OptProfileSelector::kMIN).d[i] && shape.d[i] <= bound(name, profile_, OptProfileSelector::kMAX).d[i];
      if (!fits) return refuse("the shape is outside the profile");
    }
    return shapes_[name] = shape, true;
  }
  Dims getTensorShape(const char* name) const noexcept override { return shapes_.at(name == std::string("out") ? "x" : "context"); }
  bool setTensorAddress(const char* name, void* data) noexcept override { return addresses_[name] = data, data != nullptr; }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    if (words_.find("no-enqueue") != std::string::npos || !stream) return refuse("enqueueV3: told to fail\nmore of the log");
    const Dims shape = shapes_.at("x"), other = shapes_.at("context");
    const auto* mask = static_cast<const bool*>(addresses_.at("mask"));
    for (int i = 0; i < shape.d[0] * shape.d[1] * 8; ++i) at("out")[i] = mask[i / 8] ? 2 * at("x")[i] : 0;
    for (int i = 0; i < other.d[0] * other.d[1] * 6; ++i) at("context_out")[i] = 3 * at("context")[i];
    return true;
  }

 private:
  float* at(const char* name) { return static_cast<float*>(addresses_.at(name)); }

  std::string words_;
  int profile_ = -1;
  std::map<std::string, Dims> shapes_;
  std::map<std::string, void*> addresses_;
};

class FakeEngine : public ICudaEngine, UnusedVCudaEngine {
 public:
  explicit FakeEngine(std::string words) : words_(std::move(words)) { mImpl = this; }

  ~FakeEngine() override {
    if (current_device() != device_) std::abort();
  }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
    if (current_device() != device_) return refuse("the engine is on another device"), nullptr;
    if (words_.find("no-context") == std::string::npos) return new FakeContext(words_);
    return refuse("no memory for a context"), nullptr;
  }
  int32_t getNbOptimizationProfiles() const noexcept override { return 2; }
  Dims getTensorShape(const char* name) const noexcept override { return dims(-1, -1, features_of(name)); }
  Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector which) const noexcept override { return bound(name, profile, which); }
  TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    const std::string tensor = name;
    if (tensor == "out" || tensor == "context_out") return TensorIOMode::kOUTPUT;
    return tensor == "x" || features_of(tensor) != 8 ? TensorIOMode::kINPUT : TensorIOMode::kNONE;
  }
  DataType getTensorDataType(const char* name) const noexcept override {
    if (words_.find("half") != std::string::npos) return DataType::kHALF;
    return features_of(name) ? DataType::kFLOAT : DataType::kBOOL;
  }

 private:
  std::string words_;
  const int device_ = current_device();
};

class FakeRuntime : public IRuntime, UnusedVRuntime {
 public:
  FakeRuntime() { mImpl = this; }
  void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }
  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) noexcept override {
    const std::string words(static_cast<const char*>(plan), size);
    if (words.rfind("fake engine", 0) != 0) return refuse("the plan's magic tag does not match"), nullptr;
    if (words.find("host-code") != std::string::npos && !host_code_) return refuse("the engine has host code, which is not allowed"), nullptr;
    return new FakeEngine(words);
  }

 private:
  bool host_code_ = false;
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* createInferRuntime_INTERNAL(void* given, int32_t version) noexcept {
  logger = static_cast<ILogger*>(given);
  return version == NV_TENSORRT_VERSION ? static_cast<IRuntime*>(new FakeRuntime) : nullptr;
}
EXPORTED int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
EXPORTED int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
EXPORTED int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
EXPORTED int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }
