#include "engine_runner.hpp"

#include <algorithm>
#include <map>

#include "text.hpp"

namespace bca {
namespace {

constexpr std::size_t kNoProfile = static_cast<std::size_t>(-1);

struct Buffer {
  void* memory = nullptr;
  std::size_t bytes = 0;
};

template <typename Views> bool all_on_gpu(const Views& views) {
  return std::all_of(views.begin(), views.end(), [](const auto& view) { return view.memory == Memory::Cuda; });
}

std::size_t bytes_of(const Shape& shape, DType dtype) { return count_of(shape) * size_of(dtype); }

}  // namespace

/// One execution context with all that belongs to it.
struct EngineRunner::Slot {
  Gpu& gpu;
  std::unique_ptr<EngineContext> context;
  void* stream = nullptr;
  void* done = nullptr;        // an event behind the last work, on whichever stream that was
  void* copied = nullptr;      // an event behind the copies from host memory
  std::map<std::string, Buffer> buffers;
  std::size_t profile = kNoProfile;
  bool busy = true;

  explicit Slot(Gpu& on) : gpu(on) {}
  ~Slot() {
    context.reset();
    for (auto& [name, buffer] : buffers) gpu.release(buffer.memory);
    if (done) gpu.release_event(done);
    if (copied) gpu.release_event(copied);
    if (stream) gpu.release_stream(stream);
  }
};

/// A slot for one call. Where the call fails, the slot is thrown away: nothing of its state can be relied on.
class EngineRunner::Lease {
 public:
  Lease(EngineRunner& owner, std::size_t profile, void* given) : owner_(owner), slot(*owner.take(profile)), stream(given ? given : slot.stream) {}
  ~Lease() { owner_.give(&slot, broken ? stream : nullptr); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

 private:
  EngineRunner& owner_;

 public:
  Slot& slot;
  void* const stream;  // the caller's, or the slot's own
  bool broken = true;
};

EngineRunner::EngineRunner(RunnerInfo info, std::unique_ptr<Gpu> gpu, std::unique_ptr<Engine> engine, int contexts)
    : Runner(std::move(info)), gpu_(std::move(gpu)), engine_(std::move(engine)), contexts_(static_cast<std::size_t>(contexts)) {
  for (const auto* tensors : {&this->info.signature.inputs, &this->info.signature.outputs}) {
    for (const TensorInfo& tensor : *tensors) {
      const DType found = engine_->dtype(tensor.name);
      if (found == tensor.dtype) continue;
      throw EngineError("the engine's " + tensor.name + " is " + name_of(found) + ", the manifest says " + name_of(tensor.dtype) +
                        "; build the engine again");
    }
  }
  profiles_ = engine_->profiles(this->info.signature.inputs);
}

EngineRunner::~EngineRunner() {
  try {
    const OnGpu device(*gpu_);
    wait_for_calls();
    slots_.clear();
    engine_.reset();
  } catch (const EngineError&) {  // the GPU is gone, and the memory with it
  }
}

/// Work that was queued on a caller's stream may not have ended.
void EngineRunner::wait_for_calls() noexcept {
  for (const auto& slot : slots_) {
    try {
      gpu_->wait_for(slot->done);
    } catch (const EngineError&) {  // it has failed, so it uses nothing any more
    }
  }
}

void EngineRunner::run(const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void* stream) {
  std::vector<Shape> shapes;
  for (const View& view : inputs) shapes.push_back(view.shape);
  const std::size_t profile = choose_profile(profiles_, info.signature.inputs, shapes);
  const OnGpu device(*gpu_);
  Lease lease(*this, profile, stream);
  queue(lease.slot, profile, inputs, outputs, lease.stream);
  if (!stream || !all_on_gpu(outputs)) gpu_->wait(lease.stream);
  else if (!all_on_gpu(inputs)) gpu_->wait_for(lease.slot.copied);  // a copy may read host memory until then
  lease.broken = false;
}

void EngineRunner::queue(Slot& slot, std::size_t profile, const std::vector<View>& inputs, const std::vector<MutableView>& outputs,
                         void* stream) {
  gpu_->wait_on(stream, slot.done);  // the last call's stream may have been another one
  if (slot.profile != profile) need(slot.context->set_profile(profile, stream), "profile " + std::to_string(profile));
  slot.profile = profile;
  set_inputs(slot, inputs, stream);
  gpu_->record(slot.copied, stream);
  set_outputs(slot, outputs);
  need(slot.context->enqueue(stream), "the call");
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const MutableView& view = outputs[i];
    if (view.memory == Memory::Cuda) continue;
    gpu_->copy_out(view.data, slot.buffers[info.signature.outputs[i].name].memory, bytes_of(view.shape, view.dtype), stream);
  }
  gpu_->record(slot.done, stream);
}

void EngineRunner::set_inputs(Slot& slot, const std::vector<View>& inputs, void* stream) {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const View& view = inputs[i];
    const std::string& name = info.signature.inputs[i].name;
    void* memory = const_cast<void*>(view.data);
    if (view.memory == Memory::Cpu) {
      const std::size_t bytes = bytes_of(view.shape, view.dtype);
      memory = buffer(slot, name, bytes);
      gpu_->copy_in(memory, view.data, bytes, stream);
    }
    need(slot.context->set_input_shape(name, view.shape), "shape " + text::shown(view.shape) + " of " + name);
    need(slot.context->set_address(name, memory), "the address of " + name);
  }
}

void EngineRunner::set_outputs(Slot& slot, const std::vector<MutableView>& outputs) {
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const MutableView& view = outputs[i];
    const std::string& name = info.signature.outputs[i].name;
    const Shape made = slot.context->output_shape(name);
    if (made != view.shape) {
      throw EngineError("the engine makes " + name + " " + text::shown(made) + ", the manifest says " + text::shown(view.shape) +
                        "; build the engine again");
    }
    void* memory = view.memory == Memory::Cuda ? view.data : buffer(slot, name, bytes_of(view.shape, view.dtype));
    need(slot.context->set_address(name, memory), "the address of " + name);
  }
}

void* EngineRunner::buffer(Slot& slot, const std::string& name, std::size_t bytes) {
  Buffer& found = slot.buffers[name];
  if (found.bytes >= bytes) return found.memory;
  gpu_->wait_for(slot.done);  // the last call may still read it
  gpu_->release(found.memory);
  found = {};
  found.memory = gpu_->allocate(bytes);
  found.bytes = bytes;
  return found.memory;
}

void EngineRunner::need(bool accepted, const std::string& what) {
  if (!accepted) throw EngineError("the engine refused " + what + ": " + engine_->last_error());
}

EngineRunner::Slot* EngineRunner::take(std::size_t profile) {
  std::unique_lock lock(mutex_);
  Slot* free = nullptr;
  freed_.wait(lock, [&] {
    for (const auto& slot : slots_) {  // one that has the profile already is spared the switch
      if (!slot->busy && (!free || slot->profile == profile)) free = slot.get();
    }
    return free || made_ < contexts_;
  });
  if (free) {
    free->busy = true;
    return free;
  }
  ++made_;
  lock.unlock();  // a context takes long to make, and others may give theirs back meanwhile
  try {
    auto made = make_slot();
    lock.lock();
    return slots_.emplace_back(std::move(made)).get();
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    --made_;
    freed_.notify_one();
    throw;
  }
}

std::unique_ptr<EngineRunner::Slot> EngineRunner::make_slot() {
  auto slot = std::make_unique<Slot>(*gpu_);
  slot->stream = gpu_->make_stream();
  slot->done = gpu_->make_event();
  slot->copied = gpu_->make_event();
  slot->context = engine_->make_context();
  need(slot->context != nullptr, "an execution context");
  return slot;
}

void EngineRunner::give(Slot* slot, void* broken_stream) noexcept {
  std::unique_ptr<Slot> dropped;  // freed after the lock
  if (broken_stream) {
    try {
      gpu_->wait(broken_stream);  // copies may still use its buffers
    } catch (const EngineError&) {  // it is thrown away all the same
    }
  }
  const std::lock_guard lock(mutex_);
  slot->busy = false;
  if (broken_stream) {
    const auto at = std::find_if(slots_.begin(), slots_.end(), [&](const auto& one) { return one.get() == slot; });
    dropped = std::move(*at);
    slots_.erase(at);
    --made_;
  }
  freed_.notify_one();
}

}  // namespace bca
