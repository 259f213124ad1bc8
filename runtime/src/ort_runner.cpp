#include "ort_runner.hpp"

#include <exception>
#include <thread>

#include "denormals.hpp"
#include "text.hpp"

namespace bca {
namespace {

ONNXTensorElementDataType element_of(DType dtype) {
  switch (dtype) {
    case DType::Float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::BFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::Bool: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    case DType::Int32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case DType::Int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;  // the manifest has no others
  }
}

/// Calls `make` on a thread of its own, so that what it does to the floating-point mode ends with that thread.
template <typename Make> void on_own_thread(Make make) {
  std::exception_ptr error;
  std::thread([&] {
    try {
      make();
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

RunnerInfo info_of(const OrtLibrary& library, const Bundle& bundle, const ModelEntry& model, Backend backend) {
  return {backend, model.precision, model.file + " on onnxruntime " + library.version, signature_of(bundle.manifest, model), {}};
}

}  // namespace

OrtRunner::OrtRunner(std::shared_ptr<OrtLibrary> library, const Bundle& bundle, const ModelEntry& model, Backend backend,
                     const Options& options)
    : Runner(info_of(*library, bundle, model, backend)),
      library_(std::move(library)),
      cpu_(nullptr, library_->api->ReleaseMemoryInfo),
      session_(nullptr, library_->api->ReleaseSession) {
  OrtMemoryInfo* memory = nullptr;
  library_->check(library_->api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), "onnxruntime has no CPU memory");
  cpu_.reset(memory);
  const std::string file = bundle.path(model.file).string();
  on_own_thread([&] { session_ = make(file, options); });
}

OrtPtr<OrtSession> OrtRunner::make(const std::string& file, const Options& given) const {
  const OrtApi& api = *library_->api;
  OrtSessionOptions* made = nullptr;
  library_->check(api.CreateSessionOptions(&made), "onnxruntime makes no options");
  const OrtPtr<OrtSessionOptions> options(made, api.ReleaseSessionOptions);
  library_->check(api.SetIntraOpNumThreads(made, given.threads), "onnxruntime refuses the number of threads");
  library_->check(api.SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), "onnxruntime refuses the log level");
  const bool on_cuda = info.backend == Backend::OnnxRuntimeCuda;
  if (on_cuda) add_cuda(made, given.device);
  else add_cpu(made, given.spinning);
  OrtSession* session = nullptr;
  try {
    library_->check(api.CreateSession(library_->env, file.c_str(), made, &session), "onnxruntime does not open " + file);
  } catch (const EngineError& error) {
    if (on_cuda) throw;
    throw BundleError(error.what());
  }
  return {session, api.ReleaseSession};
}

void OrtRunner::add_cpu(OrtSessionOptions* options, bool spinning) const {
  const auto set = [&](const char* key, const char* value) {
    library_->check(library_->api->AddSessionConfigEntry(options, key, value), "onnxruntime refuses an option");
  };
  set("session.set_denormal_as_zero", "1");  // for the threads of its pool; the calling thread flushes by itself
  set("session.intra_op.allow_spinning", spinning ? "1" : "0");
}

void OrtRunner::add_cuda(OrtSessionOptions* options, int device) const {
  const OrtApi& api = *library_->api;
  OrtCUDAProviderOptionsV2* made = nullptr;
  library_->check(api.CreateCUDAProviderOptions(&made), "CUDAExecutionProvider does not start here");
  const OrtPtr<OrtCUDAProviderOptionsV2> cuda(made, api.ReleaseCUDAProviderOptions);
  const std::string number = std::to_string(device);
  const char *key = "device_id", *value = number.c_str();
  library_->check(api.UpdateCUDAProviderOptions(made, &key, &value, 1), "CUDAExecutionProvider does not take device " + number);
  library_->check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, made), "CUDAExecutionProvider does not start here");
}

OrtPtr<OrtValue> OrtRunner::value(const void* data, DType dtype, const Shape& shape) const {
  OrtValue* made = nullptr;
  const std::size_t bytes = count_of(shape) * size_of(dtype);
  OrtStatus* status = library_->api->CreateTensorWithDataAsOrtValue(cpu_.get(), const_cast<void*>(data), bytes, shape.data(), shape.size(),
                                                                    element_of(dtype), &made);
  library_->check(status, "onnxruntime refuses a tensor");
  return {made, library_->api->ReleaseValue};
}

std::string OrtRunner::shapes_of(const std::vector<View>& inputs) const {
  std::vector<std::string> shapes;
  for (std::size_t i = 0; i < inputs.size(); ++i) shapes.push_back(info.signature.inputs[i].name + " " + text::shown(inputs[i].shape));
  return text::join(shapes);
}

void OrtRunner::run(const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void*) {
  std::vector<const char*> names_in, names_out;
  std::vector<OrtPtr<OrtValue>> held;
  std::vector<const OrtValue*> values_in;
  std::vector<OrtValue*> values_out;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    names_in.push_back(info.signature.inputs[i].name.c_str());
    values_in.push_back(held.emplace_back(value(inputs[i].data, inputs[i].dtype, inputs[i].shape)).get());
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    names_out.push_back(info.signature.outputs[i].name.c_str());
    values_out.push_back(held.emplace_back(value(outputs[i].data, outputs[i].dtype, outputs[i].shape)).get());
  }
  const Flushed flushed;
  OrtStatus* status = library_->api->Run(session_.get(), nullptr, names_in.data(), values_in.data(), values_in.size(), names_out.data(),
                                         values_out.size(), values_out.data());
  if (status) library_->check(status, "onnxruntime failed on " + shapes_of(inputs));
}

}  // namespace bca
