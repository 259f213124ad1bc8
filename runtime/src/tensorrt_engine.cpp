#include "tensorrt_engine.hpp"

#include <NvInferRuntime.h>

#include <algorithm>
#include <mutex>

#include "bytes.hpp"
#include "cuda_gpu.hpp"
#include "engine_runner.hpp"
#include "engines.hpp"
#include "library.hpp"

namespace bca {
namespace {

#ifdef BCA_RTX
constexpr Backend kBackend = Backend::Rtx;
constexpr const char *kName = "rtx", *kFile = "libtensorrt_rtx.so";
#else
constexpr Backend kBackend = Backend::TensorRT;
constexpr const char *kName = "tensorrt", *kFile = "libnvinfer.so";
#endif

/// Keeps the last error that the library told, from whichever thread.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard lock(mutex_);
    last_ = message;
  }
  std::string last() {
    const std::lock_guard lock(mutex_);
    return last_.empty() ? "the library gives no reason" : last_.substr(0, last_.find('\n'));
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

class Library {
 public:
  explicit Library(const std::string& path) {
    const std::string name = std::string(kFile) + "." + std::to_string(NV_TENSORRT_MAJOR);
    const std::vector<std::string> places = path.empty() ? std::vector<std::string>{name, kFile} : std::vector<std::string>{path};
    handle_ = open_library(kName, places, "install it, or give its file in Options.tensorrt_library");
  }
  std::string version() const {
    std::string text;
    for (const char* part : {"Major", "Minor", "Patch", "Build"}) {
      const auto number = function_of<std::int32_t (*)()>(handle_, kName, (std::string("getInferLib") + part + "Version").c_str());
      text += (text.empty() ? "" : ".") + std::to_string(number());
    }
    return text;
  }
  std::unique_ptr<nvinfer1::IRuntime> runtime(Logger& logger) const {
    // Asked for by the headers' version: the library refuses what it is not compatible with.
    const auto create = function_of<void* (*)(void*, std::int32_t)>(handle_, kName, "createInferRuntime_INTERNAL");
    std::unique_ptr<nvinfer1::IRuntime> made(static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION)));
    if (!made) throw EngineError(std::string(kName) + " " + version() + " does not start: " + logger.last());
    return made;
  }

 private:
  void* handle_;
};

nvinfer1::Dims as_dims(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
  return dims;
}

Shape as_shape(const nvinfer1::Dims& dims) { return dims.nbDims < 0 ? Shape{} : Shape(dims.d, dims.d + dims.nbDims); }

class Context : public EngineContext {
 public:
  explicit Context(nvinfer1::IExecutionContext* context) : context_(context) {}
  bool set_profile(std::size_t profile, void* stream) override {
    return context_->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), static_cast<cudaStream_t>(stream));
  }
  bool set_input_shape(const std::string& name, const Shape& shape) override { return context_->setInputShape(name.c_str(), as_dims(shape)); }
  Shape output_shape(const std::string& name) override { return as_shape(context_->getTensorShape(name.c_str())); }
  bool set_address(const std::string& name, void* memory) override { return context_->setTensorAddress(name.c_str(), memory); }
  bool enqueue(void* stream) override { return context_->enqueueV3(static_cast<cudaStream_t>(stream)); }

 private:
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorrtEngine : public Engine {
 public:
  TensorrtEngine(const Library& library, const std::string& file, bool host_code) : runtime_(library.runtime(logger_)) {
    const std::string plan = bytes::read(file);
    runtime_->setEngineHostCodeAllowed(host_code);
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine_) throw EngineError(file + " does not open here: " + logger_.last());
  }
  std::unique_ptr<EngineContext> make_context() override {
    nvinfer1::IExecutionContext* made = engine_->createExecutionContext();
    return made ? std::make_unique<Context>(made) : nullptr;
  }
  std::vector<Profile> profiles(const std::vector<TensorInfo>& inputs) override {
    std::vector<Profile> found(static_cast<std::size_t>(engine_->getNbOptimizationProfiles()));
    for (std::size_t i = 0; i < found.size(); ++i) {
      for (const TensorInfo& input : inputs) found[i].push_back(range(input.name.c_str(), static_cast<std::int32_t>(i)));
    }
    return found;
  }
  DType dtype(const std::string& name) override {
    if (engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kNONE) throw EngineError("the engine has no tensor " + name);
    switch (engine_->getTensorDataType(name.c_str())) {
      case nvinfer1::DataType::kFLOAT: return DType::Float32;
      case nvinfer1::DataType::kHALF: return DType::Float16;
      case nvinfer1::DataType::kBF16: return DType::BFloat16;
      case nvinfer1::DataType::kBOOL: return DType::Bool;
      case nvinfer1::DataType::kINT32: return DType::Int32;
      case nvinfer1::DataType::kINT64: return DType::Int64;
      default: throw EngineError("the engine's " + name + " has an element type that no model here has");
    }
  }
  std::string last_error() override { return logger_.last(); }

 private:
  ShapeRange range(const char* name, std::int32_t profile) const {
    using nvinfer1::OptProfileSelector;
    const Shape fixed = as_shape(engine_->getTensorShape(name));
    const auto at = [&](OptProfileSelector which) { return as_shape(engine_->getProfileShape(name, profile, which)); };
    const bool dynamic = std::find(fixed.begin(), fixed.end(), -1) != fixed.end();  // a fixed input is in no profile
    if (!dynamic) return {fixed, fixed, fixed};
    return {at(OptProfileSelector::kMIN), at(OptProfileSelector::kOPT), at(OptProfileSelector::kMAX)};
  }

  Logger logger_;  // outlives the runtime, which outlives the engine
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
};

std::unique_ptr<Engine> load(const Library& library, const Bundle& bundle, const EngineEntry& entry, Gpu& gpu, bool host_code) {
  const OnGpu device(gpu);
  return std::make_unique<TensorrtEngine>(library, bundle.path(entry.file).string(), host_code);
}

RunnerInfo info_of(const Bundle& bundle, const EngineEntry& entry, const std::string& version) {
  return {kBackend, entry.precision, entry.file + " on " + kName + " " + version, signature_of(bundle.manifest, entry), entry.profiles};
}

}  // namespace

std::unique_ptr<Runner> open_engine(const Bundle& bundle, const Options& options) {
  auto gpu = std::make_unique<CudaGpu>(options.cuda_library, options.device);
  const Library library(options.tensorrt_library);
  const EngineEntry& entry = usable_engine(bundle, kName, library.version(), gpu->capability(), options.precision);
  auto engine = load(library, bundle, entry, *gpu, options.host_code);
  return std::make_unique<EngineRunner>(info_of(bundle, entry, library.version()), std::move(gpu), std::move(engine), options.contexts);
}

}  // namespace bca
