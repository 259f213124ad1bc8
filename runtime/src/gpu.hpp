// What an engine runner needs of CUDA and of NVIDIA's library, and nothing more: tests put doubles behind these.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "profiles.hpp"

namespace bca {

/// CUDA's runtime on one device. A stream and an event are its own handles. Everything throws EngineError where CUDA fails,
/// but what is noexcept.
class Gpu {
 public:
  virtual ~Gpu() = default;
  virtual int enter() = 0;                        // make this the thread's device; returns the one before
  virtual void leave(int before) noexcept = 0;

  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
  virtual void copy_in(void* to, const void* from, std::size_t bytes, void* stream) = 0;    // from host memory
  virtual void copy_out(void* to, const void* from, std::size_t bytes, void* stream) = 0;   // to host memory

  virtual void* make_stream() = 0;                // ordered with the legacy default stream
  virtual void release_stream(void* stream) noexcept = 0;
  virtual void wait(void* stream) = 0;            // until everything on it is done; throws what failed meanwhile

  virtual void* make_event() = 0;
  virtual void release_event(void* event) noexcept = 0;
  virtual void record(void* event, void* stream) = 0;
  virtual void wait_on(void* stream, void* event) = 0;   // the stream waits, the caller does not
  virtual void wait_for(void* event) = 0;                // the caller waits
};

/// The device of the calling thread, for a while.
class OnGpu {
 public:
  explicit OnGpu(Gpu& gpu) : gpu_(gpu), before_(gpu.enter()) {}
  ~OnGpu() { gpu_.leave(before_); }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

 private:
  Gpu& gpu_;
  int before_;
};

/// An execution context: one call at a time.
class EngineContext {
 public:
  virtual ~EngineContext() = default;
  virtual bool set_profile(std::size_t profile, void* stream) = 0;
  virtual bool set_input_shape(const std::string& name, const Shape& shape) = 0;
  virtual Shape output_shape(const std::string& name) = 0;        // once every input shape is set
  virtual bool set_address(const std::string& name, void* memory) = 0;
  virtual bool enqueue(void* stream) = 0;
};

class Engine {
 public:
  virtual ~Engine() = default;
  virtual std::unique_ptr<EngineContext> make_context() = 0;      // null where refused, for lack of memory mostly
  virtual std::vector<Profile> profiles(const std::vector<TensorInfo>& inputs) = 0;
  virtual DType dtype(const std::string& name) = 0;               // throws EngineError where it has no such tensor
  virtual std::string last_error() = 0;                           // what the library said last
};

}  // namespace bca
