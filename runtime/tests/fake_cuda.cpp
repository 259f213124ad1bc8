// CUDA's runtime with host memory as the GPU's, for fake_tensorrt.cpp: $FAKE_GPUS of compute capability 8.9, one by default.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

namespace {

thread_local int device = 0;

int count() {
  const char* given = std::getenv("FAKE_GPUS");
  return given ? std::atoi(given) : 1;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error"; }
EXPORTED cudaError_t cudaGetDeviceCount(int* found) { return *found = count(), *found ? cudaSuccess : cudaErrorNoDevice; }
EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) { return *value = what == cudaDevAttrComputeCapabilityMajor ? 8 : 9, cudaSuccess; }
EXPORTED cudaError_t cudaGetDevice(int* found) { return *found = device, cudaSuccess; }
EXPORTED cudaError_t cudaSetDevice(int wanted) { return device = wanted, wanted < count() ? cudaSuccess : cudaErrorInvalidDevice; }
EXPORTED cudaError_t cudaMalloc(void** memory, size_t bytes) { return (*memory = std::malloc(bytes)) ? cudaSuccess : cudaErrorMemoryAllocation; }
EXPORTED cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) { return std::memcpy(to, from, bytes), cudaSuccess; }
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = static_cast<cudaStream_t>(std::malloc(1)), cudaSuccess; }
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t stream) { return std::free(stream), cudaSuccess; }
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = static_cast<cudaEvent_t>(std::malloc(1)), cudaSuccess; }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) { return std::free(event), cudaSuccess; }
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
