// One model on ONNX Runtime, on the CPU or on CUDA through its execution provider.
#pragma once

#include <memory>

#include "ort_library.hpp"
#include "runner.hpp"

namespace bca {

class OrtRunner : public Runner {
 public:
  /// `options`: threads and spinning on the CPU, the device on CUDA. Throws BundleError where the model does not open on the CPU;
  /// EngineError where it does not on CUDA, which may be the GPU's fault as well, or where the provider does not start.
  OrtRunner(std::shared_ptr<OrtLibrary> library, const Bundle& bundle, const ModelEntry& model, Backend backend, const Options& options);

  bool on_gpu() const override { return false; }  // views of GPU memory are for the engines
  void run(const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void* stream) override;

 private:
  OrtPtr<OrtSession> make(const std::string& file, const Options& options) const;
  void add_cpu(OrtSessionOptions* options, bool spinning) const;
  void add_cuda(OrtSessionOptions* options, int device) const;
  std::string shapes_of(const std::vector<View>& inputs) const;
  OrtPtr<OrtValue> value(const void* data, DType dtype, const Shape& shape) const;

  std::shared_ptr<OrtLibrary> library_;
  OrtPtr<OrtMemoryInfo> cpu_;
  OrtPtr<OrtSession> session_;
};

}  // namespace bca
