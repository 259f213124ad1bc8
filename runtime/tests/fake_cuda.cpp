// CUDA's runtime with host memory as the GPU's, for fake_tensorrt.cpp: $FAKE_GPUS of compute capability 8.9, one by default.
// A stream and an event begin with the number of their device. What a real one would refuse or do on another device ends the
// process where its status is not looked at: calls with the thread on another device, and copies in the wrong direction.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

thread_local int device = 0;

int count() {
  const char* given = std::getenv("FAKE_GPUS");
  return given ? std::atoi(given) : 1;
}

std::mutex mutex;
std::map<void*, int> memory;  // each allocation's device

cudaError_t here(const void* stream_or_event) {
  return *static_cast<const int*>(stream_or_event) == device ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

void* make_handle() { return new int(device); }

cudaError_t release(void* handle) {
  if (here(handle) != cudaSuccess) std::abort();
  return delete static_cast<int*>(handle), cudaSuccess;
}

bool is_ours(const void* at) {
  const std::lock_guard lock(mutex);
  const auto found = memory.find(const_cast<void*>(at));
  return found != memory.end() && found->second == device;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const cudaMemcpyKind wanted = is_ours(to) ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  if (kind != wanted || is_ours(to) == is_ours(from)) return cudaErrorInvalidMemcpyDirection;
  return std::memcpy(to, from, bytes), here(stream);
}

cudaError_t allocate(void** made, size_t bytes) {
  const std::lock_guard lock(mutex);
  memory[*made = std::malloc(bytes)] = device;
  return cudaSuccess;
}

cudaError_t free_memory(void* freed) {
  if (freed && !is_ours(freed)) std::abort();
  const std::lock_guard lock(mutex);
  memory.erase(freed);
  return std::free(freed), cudaSuccess;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error"; }
EXPORTED cudaError_t cudaGetDeviceCount(int* found) { return *found = count(), *found ? cudaSuccess : cudaErrorNoDevice; }
EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) { return *value = what == cudaDevAttrComputeCapabilityMajor ? 8 : 9, cudaSuccess; }
EXPORTED cudaError_t cudaGetDevice(int* found) { return *found = device, cudaSuccess; }
EXPORTED cudaError_t cudaSetDevice(int wanted) { return device = wanted, wanted < count() ? cudaSuccess : cudaErrorInvalidDevice; }
EXPORTED cudaError_t cudaMalloc(void** made, size_t bytes) { return allocate(made, bytes); }
EXPORTED cudaError_t cudaFree(void* freed) { return free_memory(freed); }
EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) { return copy(to, from, bytes, kind, stream); }
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = static_cast<cudaStream_t>(make_handle()), cudaSuccess; }
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t stream) { return release(stream); }
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return here(stream); }
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) { return here(event) == cudaSuccess ? here(stream) : here(event); }
EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = static_cast<cudaEvent_t>(make_handle()), cudaSuccess; }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) { return release(event); }
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return here(event) == cudaSuccess ? here(stream) : here(event); }
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t event) { return here(event); }
