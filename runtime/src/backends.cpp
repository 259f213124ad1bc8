#include "backends.hpp"

#include <algorithm>

#include "engines.hpp"
#include "enums.hpp"
#include "text.hpp"

#ifdef BCA_ONNXRUNTIME
#include "ort_runner.hpp"
#endif
#if defined(BCA_TENSORRT) || defined(BCA_RTX)
#include "tensorrt_engine.hpp"
#endif

namespace bca {
namespace {

constexpr const char* kNames[] = {"auto", "tensorrt", "rtx", "onnxruntime-cuda", "onnxruntime-cpu"};
constexpr const char* kPrecisions[] = {"fp32", "fp16", "bf16"};

[[maybe_unused]] std::unique_ptr<Runner> not_built(const std::string& what, const std::string& option, const std::string& root) {
  throw EngineError("this build of bca_runtime has no " + what + "; build it with -D" + option + "=ON -D" + root + "=DIRECTORY");
}

std::unique_ptr<Runner> open_tensorrt(const Bundle& bundle, const Options& options) {
  check_has_engine(bundle, "tensorrt", options.precision);
#ifdef BCA_TENSORRT
  return open_engine(bundle, options);
#else
  return not_built("TensorRT", "BCA_TENSORRT", "TENSORRT_ROOT");
#endif
}

std::unique_ptr<Runner> open_rtx(const Bundle& bundle, const Options& options) {
  check_has_engine(bundle, "rtx", options.precision);
#ifdef BCA_RTX
  return open_engine(bundle, options);
#else
  return not_built("TensorRT-RTX", "BCA_RTX", "TENSORRT_ROOT");
#endif
}

#ifdef BCA_ONNXRUNTIME
std::string names_of(const std::vector<Precision>& precisions, const char* between) {
  std::vector<std::string> names;
  for (const Precision precision : precisions) names.emplace_back(name_of(precision));
  return text::join(names, between);
}

const ModelEntry& portable(const Bundle& bundle, const Options& options, std::vector<Precision> order) {
  if (options.precision) order = {*options.precision};
  std::vector<Precision> has;
  for (const ModelEntry& model : bundle.manifest.models) {
    if (model.runtime == "portable") has.push_back(model.precision);
  }
  for (const Precision precision : order) {
    for (const ModelEntry& model : bundle.manifest.models) {
      if (model.runtime == "portable" && model.precision == precision) return model;
    }
  }
  throw InputError("precision " + names_of(order, " or ") + " is not in the bundle, which has " + names_of(has, ", ") +
                   "; export it with --precision " + name_of(order.front()));
}

const ModelEntry& cpu_model(const Bundle& bundle, const Options& options) {
  if (options.precision == Precision::Bf16) {
    throw InputError("onnxruntime has no bfloat16 products on the CPU; open with precision='fp32' or 'fp16', or on a GPU");
  }
  for (const ModelEntry& model : bundle.manifest.models) {
    if (model.runtime == "onnxruntime-cpu" && (!options.precision || model.precision == *options.precision)) return model;
  }
  return portable(bundle, options, {Precision::Fp32, Precision::Fp16});
}
#endif

std::unique_ptr<Runner> open_cuda([[maybe_unused]] const Bundle& bundle, [[maybe_unused]] const Options& options) {
#ifdef BCA_ONNXRUNTIME
  auto library = OrtLibrary::open(options.onnxruntime_library);
  const std::vector<std::string> providers = library->providers();
  if (std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") == providers.end()) {
    throw EngineError("this onnxruntime has no CUDA provider; use the library of onnxruntime's GPU build");
  }
  const ModelEntry& model = portable(bundle, options, {Precision::Fp16, Precision::Bf16, Precision::Fp32});
  return std::make_unique<OrtRunner>(std::move(library), bundle, model, Backend::OnnxRuntimeCuda, options);
#else
  return not_built("onnxruntime", "BCA_ONNXRUNTIME", "ORT_ROOT");
#endif
}

std::unique_ptr<Runner> open_cpu([[maybe_unused]] const Bundle& bundle, [[maybe_unused]] const Options& options) {
#ifdef BCA_ONNXRUNTIME
  const ModelEntry& model = cpu_model(bundle, options);
  auto library = OrtLibrary::open(options.onnxruntime_library);
  return std::make_unique<OrtRunner>(std::move(library), bundle, model, Backend::OnnxRuntimeCpu, options);
#else
  return not_built("onnxruntime", "BCA_ONNXRUNTIME", "ORT_ROOT");
#endif
}

std::unique_ptr<Runner> open_runner(Backend backend, const Bundle& bundle, const Options& options) {
  switch (backend) {
    case Backend::TensorRT: return open_tensorrt(bundle, options);
    case Backend::Rtx: return open_rtx(bundle, options);
    case Backend::OnnxRuntimeCuda: return open_cuda(bundle, options);
    default: return open_cpu(bundle, options);
  }
}

std::string shown(const Runner& runner) { return std::string(name_of(runner.info.backend)) + ": " + runner.info.what; }

}  // namespace

const char* name_of(Backend backend) { return enums::name("backend", backend, kNames); }
const char* name_of(Precision precision) { return enums::name("precision", precision, kPrecisions); }
Backend backend_of(const std::string& name) { return enums::named<Backend>("backend", name, kNames); }
Precision precision_of(const std::string& name) { return enums::named<Precision>("precision", name, kPrecisions); }

std::pair<std::unique_ptr<Runner>, Explanation> choose(const Bundle& bundle, const Options& options) {
  if (options.backend != Backend::Auto) {
    auto runner = open_runner(options.backend, bundle, options);
    Explanation explanation{shown(*runner), {}};
    return {std::move(runner), std::move(explanation)};
  }
  Explanation explanation;
  std::vector<std::string> reasons;
  for (const Backend candidate : {Backend::TensorRT, Backend::Rtx, Backend::OnnxRuntimeCuda, Backend::OnnxRuntimeCpu}) {
    try {
      auto runner = open_runner(candidate, bundle, options);
      explanation.chosen = shown(*runner);
      return {std::move(runner), std::move(explanation)};
    } catch (const Error& error) {
      explanation.passed_over.emplace_back(name_of(candidate), error.what());
      reasons.push_back(std::string(name_of(candidate)) + ": " + error.what());
    }
  }
  throw EngineError("nothing here runs this bundle: " + text::join(reasons, "; "));
}

}  // namespace bca
