// Doubles behind gpu.hpp: host memory plays the GPU's, and the engine doubles x and trebles context. What a real engine would
// refuse or misread, these refuse: unknown addresses, buffers that are too small, shapes outside the profile, two calls at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "engine_runner.hpp"
#include "support.hpp"

namespace doubles {

/// What a test reads and sets; shared by the double's parts.
struct World {
  std::mutex mutex;
  std::map<void*, std::size_t> memory;         // what lies on the GPU
  std::set<void*> streams, events;
  std::map<void*, std::string> behind;         // each event's last work
  std::vector<std::string> log;                // copies, profiles, calls and waits, in order
  std::atomic<int> contexts{0}, running{0}, most_running{0}, made_contexts{0};
  std::function<void()> on_enqueue = [] {};
  std::string refuse;                          // the step that fails
  std::map<std::thread::id, int> devices;      // each thread's current one

  void note(const std::string& what) {
    const std::lock_guard lock(mutex);
    log.push_back(what);
  }
  /// The calling thread's device, 7 outside of calls; returns the one before.
  int set_device(int device) {
    const std::lock_guard lock(mutex);
    return std::exchange(devices.try_emplace(std::this_thread::get_id(), 7).first->second, device);
  }
  int device() {
    const std::lock_guard lock(mutex);
    return devices[std::this_thread::get_id()];
  }
  std::size_t count(const std::string& what) {
    const std::lock_guard lock(mutex);
    return static_cast<std::size_t>(std::count(log.begin(), log.end(), what));
  }
  /// The bytes from there to the end of the allocation around it; 0 where it is not the GPU's.
  std::size_t room(const void* at) {
    const std::lock_guard lock(mutex);
    const auto found = memory.find(const_cast<void*>(at));
    return found == memory.end() ? 0 : found->second;
  }
};

class Gpu : public bca::Gpu {
 public:
  explicit Gpu(World& world) : world_(world) {}

  int enter() override { return world_.set_device(0); }
  void leave(int before) noexcept override { world_.set_device(before); }
  void* allocate(std::size_t bytes) override {
    fail_at("allocate");
    void* memory = std::malloc(bytes);
    const std::lock_guard lock(world_.mutex);
    world_.memory[memory] = bytes;
    return memory;
  }
  void release(void* memory) noexcept override {
    const std::lock_guard lock(world_.mutex);
    if (!world_.memory.erase(memory)) return;
    std::free(memory);
    world_.log.push_back("free");
  }
  void copy_in(void* to, const void* from, std::size_t bytes, void* stream) override {
    ASSERT_GE(world_.room(to), bytes);
    std::memcpy(to, from, bytes);
    world_.note("in on " + name(stream));
  }
  void copy_out(void* to, const void* from, std::size_t bytes, void* stream) override {
    ASSERT_GE(world_.room(from), bytes);
    std::memcpy(to, from, bytes);
    world_.note("out on " + name(stream));
  }
  void* make_stream() override { return add(world_.streams); }
  void release_stream(void* stream) noexcept override { remove(world_.streams, stream); }
  void wait(void* stream) override {
    world_.note("wait for " + name(stream));
    fail_at("wait");
  }
  void* make_event() override { return add(world_.events); }
  void release_event(void* event) noexcept override { remove(world_.events, event); }
  void record(void* event, void* stream) override {
    const std::string on = name(stream);
    const std::lock_guard lock(world_.mutex);
    world_.behind[event] = world_.log.back().rfind("in on", 0) == 0 ? "the copies" : "the last call";
    world_.log.push_back("record on " + on);
  }
  void wait_on(void* stream, void*) override { world_.note(name(stream) + " waits"); }
  void wait_for(void* event) override {
    std::unique_lock lock(world_.mutex);
    const auto found = world_.behind.find(event);
    const std::string work = found == world_.behind.end() ? "the last call" : found->second;
    lock.unlock();
    world_.note("wait for " + work);
  }

  std::string name(void* stream) {
    const std::lock_guard lock(world_.mutex);
    return world_.streams.count(stream) ? "own" : "the caller's";
  }

 private:
  void fail_at(const std::string& step) {
    if (world_.refuse == step) throw bca::EngineError("CUDA failed at " + step);
  }
  void* add(std::set<void*>& all) {
    const std::lock_guard lock(world_.mutex);
    return *all.insert(new char).first;
  }
  void remove(std::set<void*>& all, void* one) {
    const std::lock_guard lock(world_.mutex);
    if (all.erase(one)) delete static_cast<char*>(one);
  }

  World& world_;
};

class Context : public bca::EngineContext {
 public:
  Context(World& world, const std::vector<bca::Profile>& profiles) : world_(world), profiles_(profiles) { ++world_.contexts; }
  ~Context() override { --world_.contexts; }

  bool set_profile(std::size_t profile, void*) override {
    world_.note("profile " + std::to_string(profile));
    profile_ = profile;
    return world_.refuse != "profile";
  }
  bool set_input_shape(const std::string& name, const bca::Shape& shape) override {
    const bca::ShapeRange& range = profiles_.at(profile_)[name == "x" ? 0 : 1];
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] < range.min[i] || shape[i] > range.max[i]) return false;
    }
    shapes_[name] = shape;
    return world_.refuse != "shape";
  }
  bca::Shape output_shape(const std::string& name) override {
    bca::Shape shape = shapes_.at(name == "out" ? "x" : "context");
    if (world_.refuse == "output shape") shape[1] += 1;
    return shape;
  }
  bool set_address(const std::string& name, void* memory) override {
    addresses_[name] = memory;
    return world_.refuse != "address";
  }
  bool enqueue(void* stream) override {
    world_.note("call");
    const int running = ++world_.running;
    if (running > world_.most_running) world_.most_running = running;
    world_.on_enqueue();
    static_cast<void>(stream);
    const bool went = world_.refuse != "enqueue" && compute("x", "out", 2) && compute("context", "context_out", 3);
    --world_.running;
    return went;
  }

 private:
  bool compute(const std::string& from, const std::string& to, float factor) {
    const std::size_t count = bca::count_of(shapes_.at(from));
    if (world_.room(addresses_.at(from)) < count * 4 || world_.room(addresses_.at(to)) < count * 4) return false;
    for (std::size_t i = 0; i < count; ++i) static_cast<float*>(addresses_[to])[i] = factor * static_cast<const float*>(addresses_[from])[i];
    return true;
  }

  World& world_;
  const std::vector<bca::Profile>& profiles_;
  std::size_t profile_ = 99;
  std::map<std::string, bca::Shape> shapes_;
  std::map<std::string, void*> addresses_;
};

class Engine : public bca::Engine {
 public:
  Engine(World& world, std::vector<bca::Profile> profiles) : world_(world), profiles_(std::move(profiles)) {}
  ~Engine() override { world_.note("engine gone on " + std::to_string(world_.device())); }
  std::unique_ptr<bca::EngineContext> make_context() override {
    ++world_.made_contexts;
    return world_.refuse == "context" ? nullptr : std::make_unique<Context>(world_, profiles_);
  }
  std::vector<bca::Profile> profiles(const std::vector<bca::TensorInfo>&) override { return profiles_; }
  bca::DType dtype(const std::string&) override { return world_.refuse == "dtype" ? bca::DType::Float16 : bca::DType::Float32; }
  std::string last_error() override { return "the double was told to"; }

 private:
  World& world_;
  std::vector<bca::Profile> profiles_;
};

}  // namespace doubles
