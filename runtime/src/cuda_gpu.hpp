// CUDA's runtime, opened at run time, behind the interface of gpu.hpp.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "gpu.hpp"

namespace bca {

/// The functions that are used, by name.
struct CudaFunctions {
  explicit CudaFunctions(const std::string& path);

  decltype(&cudaGetErrorString) error_string;
  decltype(&cudaGetDeviceCount) device_count;
  decltype(&cudaDeviceGetAttribute) attribute;
  decltype(&cudaGetDevice) get_device;
  decltype(&cudaSetDevice) set_device;
  decltype(&cudaFree) free;
  decltype(&cudaMemcpyAsync) copy;
  decltype(&cudaStreamDestroy) stream_destroy;
  decltype(&cudaStreamSynchronize) stream_wait;
  decltype(&cudaEventDestroy) event_destroy;
  decltype(&cudaEventRecord) event_record;
  decltype(&cudaEventSynchronize) event_wait;
  // C++ headers overload these, so their types are written out.
  cudaError_t (*allocate)(void**, std::size_t);
  cudaError_t (*stream_create)(cudaStream_t*);
  cudaError_t (*event_create)(cudaEvent_t*, unsigned);
  cudaError_t (*stream_wait_event)(cudaStream_t, cudaEvent_t, unsigned);
};

class CudaGpu : public Gpu {
 public:
  /// Throws MissingDependencyError without the library, EngineError without such a GPU.
  CudaGpu(const std::string& library, int device);

  std::string capability() const;  // such as sm89

  int enter() override;
  void leave(int before) noexcept override;
  void* allocate(std::size_t bytes) override;
  void release(void* memory) noexcept override;
  void copy_in(void* to, const void* from, std::size_t bytes, void* stream) override;
  void copy_out(void* to, const void* from, std::size_t bytes, void* stream) override;
  void* make_stream() override;
  void release_stream(void* stream) noexcept override;
  void wait(void* stream) override;
  void* make_event() override;
  void release_event(void* event) noexcept override;
  void record(void* event, void* stream) override;
  void wait_on(void* stream, void* event) override;
  void wait_for(void* event) override;

 private:
  void check(cudaError_t status, const std::string& what) const;

  CudaFunctions cuda_;
  int device_;
};

}  // namespace bca
