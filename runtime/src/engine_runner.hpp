// A compiled engine as a runner: a bounded pool of execution contexts, buffers that grow and are used again.
#pragma once

#include <condition_variable>
#include <list>
#include <mutex>

#include "gpu.hpp"
#include "runner.hpp"

namespace bca {

class EngineRunner : public Runner {
 public:
  /// `contexts`: calls in flight at once, at least 1; more wait. Throws EngineError where the engine is not what the manifest says.
  EngineRunner(RunnerInfo info, std::unique_ptr<Gpu> gpu, std::unique_ptr<Engine> engine, int contexts);
  ~EngineRunner() override;

  bool on_gpu() const override { return true; }
  void run(const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void* stream) override;

 private:
  struct Slot;
  class Lease;

  Slot* take(std::size_t profile);
  void wait_for_calls() noexcept;
  void give(Slot* slot, void* broken_stream) noexcept;  // null: the call went well
  std::unique_ptr<Slot> make_slot();
  void queue(Slot& slot, std::size_t profile, const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void* stream);
  void set_inputs(Slot& slot, const std::vector<View>& inputs, void* stream);
  void set_outputs(Slot& slot, const std::vector<MutableView>& outputs);
  void* buffer(Slot& slot, const std::string& name, std::size_t bytes);
  void need(bool accepted, const std::string& what);

  std::unique_ptr<Gpu> gpu_;
  std::unique_ptr<Engine> engine_;
  std::vector<Profile> profiles_;
  const std::size_t contexts_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::list<std::unique_ptr<Slot>> slots_;  // made when needed, at most contexts_
  std::size_t made_ = 0;                    // those, and those that a thread is making right now
};

}  // namespace bca
