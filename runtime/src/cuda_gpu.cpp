#include "cuda_gpu.hpp"

#include "library.hpp"

namespace bca {
namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t as_event(void* event) { return static_cast<cudaEvent_t>(event); }

void* open_cuda(const std::string& path) {
  const std::string name = "libcudart.so." + std::to_string(CUDART_VERSION / 1000);
  const std::vector<std::string> places = path.empty() ? std::vector<std::string>{name, "libcudart.so"} : std::vector<std::string>{path};
  return open_library("CUDA's runtime", places, "install CUDA " + std::to_string(CUDART_VERSION / 1000) + ", or give its file in Options.cuda_library");
}

template <typename Function> void find(void* handle, Function& function, const char* name) {
  function = function_of<Function>(handle, "CUDA's runtime", name);
}

}  // namespace

CudaFunctions::CudaFunctions(const std::string& path) {
  void* handle = open_cuda(path);
  find(handle, error_string, "cudaGetErrorString");
  find(handle, device_count, "cudaGetDeviceCount");
  find(handle, attribute, "cudaDeviceGetAttribute");
  find(handle, get_device, "cudaGetDevice");
  find(handle, set_device, "cudaSetDevice");
  find(handle, free, "cudaFree");
  find(handle, copy, "cudaMemcpyAsync");
  find(handle, stream_destroy, "cudaStreamDestroy");
  find(handle, stream_wait, "cudaStreamSynchronize");
  find(handle, event_destroy, "cudaEventDestroy");
  find(handle, event_record, "cudaEventRecord");
  find(handle, event_wait, "cudaEventSynchronize");
  find(handle, allocate, "cudaMalloc");
  find(handle, stream_create, "cudaStreamCreate");
  find(handle, event_create, "cudaEventCreateWithFlags");
  find(handle, stream_wait_event, "cudaStreamWaitEvent");
}

CudaGpu::CudaGpu(const std::string& library, int device) : cuda_(library), device_(device) {
  int count = 0;
  const cudaError_t status = cuda_.device_count(&count);
  if (status != cudaSuccess) throw EngineError(std::string("no GPU: ") + cuda_.error_string(status));
  if (device < 0 || device >= count) {
    throw EngineError("no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count) + ", counted from 0");
  }
}

std::string CudaGpu::capability() const {
  int major = 0, minor = 0;
  check(cuda_.attribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "the GPU's compute capability");
  check(cuda_.attribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), "the GPU's compute capability");
  return "sm" + std::to_string(major) + std::to_string(minor);
}

void CudaGpu::check(cudaError_t status, const std::string& what) const {
  if (status != cudaSuccess) throw EngineError("CUDA failed at " + what + ": " + cuda_.error_string(status));
}

int CudaGpu::enter() {
  int before = device_;
  check(cuda_.get_device(&before), "asking for the device");
  if (before != device_) check(cuda_.set_device(device_), "choosing the device");
  return before;
}

void CudaGpu::leave(int before) noexcept {
  if (before != device_) static_cast<void>(cuda_.set_device(before));
}

void* CudaGpu::allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cuda_.allocate(&memory, bytes), "allocating " + std::to_string(bytes) + " bytes");
  return memory;
}

void CudaGpu::release(void* memory) noexcept { static_cast<void>(cuda_.free(memory)); }

void CudaGpu::copy_in(void* to, const void* from, std::size_t bytes, void* stream) {
  check(cuda_.copy(to, from, bytes, cudaMemcpyHostToDevice, as_stream(stream)), "copying an input");
}

void CudaGpu::copy_out(void* to, const void* from, std::size_t bytes, void* stream) {
  check(cuda_.copy(to, from, bytes, cudaMemcpyDeviceToHost, as_stream(stream)), "copying an output");
}

void* CudaGpu::make_stream() {
  cudaStream_t stream = nullptr;
  check(cuda_.stream_create(&stream), "making a stream");
  return stream;
}

void CudaGpu::release_stream(void* stream) noexcept { static_cast<void>(cuda_.stream_destroy(as_stream(stream))); }

void CudaGpu::wait(void* stream) { check(cuda_.stream_wait(as_stream(stream)), "running the engine"); }

void* CudaGpu::make_event() {
  cudaEvent_t event = nullptr;
  check(cuda_.event_create(&event, cudaEventDisableTiming), "making an event");
  return event;
}

void CudaGpu::release_event(void* event) noexcept { static_cast<void>(cuda_.event_destroy(as_event(event))); }

void CudaGpu::record(void* event, void* stream) { check(cuda_.event_record(as_event(event), as_stream(stream)), "recording an event"); }

void CudaGpu::wait_on(void* stream, void* event) {
  check(cuda_.stream_wait_event(as_stream(stream), as_event(event), 0), "waiting for the last call");
}

void CudaGpu::wait_for(void* event) { check(cuda_.event_wait(as_event(event)), "waiting for work on the GPU"); }

}  // namespace bca
