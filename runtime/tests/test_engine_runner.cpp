// The engine runner on doubles: profiles, the pool, buffers, the caller's memory and streams, and what a failure leaves behind.
#include <chrono>
#include <condition_variable>
#include <future>
#include <thread>

#include "gpu_double.hpp"

namespace {

using doubles::World;
using support::message_of;

bca::Profile profile(std::int64_t min, std::int64_t opt, std::int64_t max) {
  return {{{1, min, 8}, {1, opt, 8}, {4, max, 8}}, {{1, min, 6}, {1, opt, 6}, {4, max, 6}}};
}

bca::RunnerInfo info() {
  const std::vector<bca::Axis> x = {"batch", "x_len", std::int64_t{8}}, context = {"batch", "context_len", std::int64_t{6}};
  return {bca::Backend::TensorRT, bca::Precision::Fp32, "double",
          {{{"x", bca::DType::Float32, x, {}}, {"context", bca::DType::Float32, context, {}}},
           {{"out", bca::DType::Float32, x, {}}, {"context_out", bca::DType::Float32, context, {}}}, {}, "", {}}, {}};
}

std::unique_ptr<bca::EngineRunner> make(World& world, int contexts = 2, std::vector<bca::Profile> profiles = {profile(1, 8, 64)}) {
  return std::make_unique<bca::EngineRunner>(info(), std::make_unique<doubles::Gpu>(world), std::make_unique<doubles::Engine>(world, profiles), contexts);
}

/// A pair and memory for its outputs, full of a number that no engine here gives.
struct Request {
  support::Pair pair;
  bca::Tensor out, context_out;

  explicit Request(std::int64_t length, unsigned seed = 1)
      : pair(1, length, length, seed), out(bca::DType::Float32, {1, length, 8}), context_out(bca::DType::Float32, {1, length, 6}) {
    for (bca::Tensor* tensor : {&out, &context_out}) std::fill_n(tensor->data<float>(), tensor->count(), -77.0f);
  }
  void run(bca::EngineRunner& runner, void* stream = nullptr) { runner.run({pair.x, pair.context}, {out, context_out}, stream); }
  bool right() const { return scaled(out, pair.x, 2) && scaled(context_out, pair.context, 3); }
  bool untouched() const { return out.data<float>()[0] == -77.0f && context_out.data<float>()[0] == -77.0f; }

 private:
  static bool scaled(const bca::Tensor& got, const bca::Tensor& from, float factor) {
    for (std::size_t i = 0; i < got.count(); ++i) {
      if (got.data<float>()[i] != factor * from.data<float>()[i]) return false;
    }
    return true;
  }
};

/// Lets callers go on two by two; for minutes only, so that a runner that never lets two in fails.
class Pairs {
 public:
  void meet() {
    std::unique_lock lock(mutex_);
    const int mine = came_++ / 2;
    if (came_ == 2 * (mine + 1)) return arrived_.notify_all();
    EXPECT_TRUE(arrived_.wait_for(lock, std::chrono::minutes(5), [&] { return came_ >= 2 * (mine + 1); }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  int came_ = 0;
};

TEST(EngineRunner, ComputesAndWaitsForIt) {
  World world;
  auto runner = make(world);
  Request request(5);
  request.run(*runner);
  EXPECT_TRUE(request.right());
  EXPECT_EQ(world.log.back(), "wait for own");
}

TEST(EngineRunner, RunsOnItsDeviceAndGivesTheThreadsBack) {
  World world;
  auto runner = make(world);
  int seen = -1;
  world.on_enqueue = [&] { seen = world.set_device(0); };
  Request(5).run(*runner);
  EXPECT_EQ(seen, 0);
  EXPECT_EQ(world.set_device(7), 7);
}

TEST(EngineRunner, TakesTheNearestProfileAndSwitchesOnlyWhenItMust) {
  World world;
  auto runner = make(world, 1, {profile(1, 8, 64), profile(1, 48, 64)});
  for (std::int64_t length : {6, 9, 50, 60, 7}) Request(length).run(*runner);
  EXPECT_EQ(world.count("profile 0"), 2u);
  EXPECT_EQ(world.count("profile 1"), 1u);
}

TEST(EngineRunner, AContextThatHasTheProfileIsPreferred) {
  World world;
  auto runner = make(world, 2, {profile(1, 8, 64), profile(1, 48, 64)});
  std::promise<void> go;
  world.on_enqueue = [gate = go.get_future().share()] { gate.wait(); };
  auto one = std::async(std::launch::async, [&] { Request(8).run(*runner); });
  while (world.running < 1) std::this_thread::yield();
  auto two = std::async(std::launch::async, [&] { Request(48).run(*runner); });
  while (world.running < 2) std::this_thread::yield();
  go.set_value();
  one.get(), two.get();
  for (std::int64_t length : {8, 48, 8, 48}) Request(length).run(*runner);
  EXPECT_EQ(world.count("profile 0") + world.count("profile 1"), 2u);
}

TEST(EngineRunner, BuffersGrowAndAreUsedAgain) {
  World world;
  auto runner = make(world, 1);
  for (std::int64_t length : {4, 32, 4, 16, 32}) {
    Request request(length, static_cast<unsigned>(length));
    request.run(*runner);
    EXPECT_TRUE(request.right()) << length;
  }
  EXPECT_EQ(world.memory.size(), 4u);  // one for each tensor, the largest
  for (const auto& [memory, bytes] : world.memory) EXPECT_GE(bytes, 32u * 6 * 4);
  EXPECT_EQ(world.count("wait for the last call"), 8u);  // before each buffer goes that a call may still use
  runner.reset();
  EXPECT_TRUE(world.memory.empty());
  EXPECT_TRUE(world.streams.empty());
  EXPECT_TRUE(world.events.empty());
  EXPECT_EQ(world.contexts, 0);
}

TEST(EngineRunner, NoMoreCallsRunAtOnceThanThereAreContexts) {
  World world;
  auto runner = make(world, 2);
  Pairs pairs;  // each call goes on when another is in it too, so that two are at work however slowly the threads come
  world.on_enqueue = [&] { pairs.meet(); };
  std::vector<std::future<bool>> calls;
  for (unsigned i = 0; i < 12; ++i) {
    calls.push_back(std::async(std::launch::async, [&, i] {
      Request request(3 + i, i);
      request.run(*runner);
      return request.right();
    }));
  }
  for (auto& call : calls) EXPECT_TRUE(call.get());
  EXPECT_EQ(world.most_running, 2);
  EXPECT_EQ(world.made_contexts, 2);
}

TEST(EngineRunner, TheCallersGpuMemoryIsUsedAsItIs) {
  World world;
  auto runner = make(world);
  doubles::Gpu gpu(world);
  const support::Pair pair(1, 4, 4, 3);
  void* x = gpu.allocate(pair.x.bytes());
  void* out = gpu.allocate(pair.x.bytes());
  void* context_out = gpu.allocate(pair.context.bytes());
  std::memcpy(x, pair.x.data(), pair.x.bytes());
  const bca::Shape shape = pair.x.shape();
  char stream = 0;
  runner->run({{static_cast<float*>(x), shape, bca::Memory::Cuda}, pair.context},
              {{static_cast<float*>(out), shape, bca::Memory::Cuda}, {static_cast<float*>(context_out), pair.context.shape(), bca::Memory::Cuda}}, &stream);
  EXPECT_EQ(static_cast<float*>(out)[9], 2 * pair.x.data<float>()[9]);
  EXPECT_EQ(world.count("in on the caller's"), 1u);  // context alone
  EXPECT_EQ(world.count("out on the caller's"), 0u);
  EXPECT_EQ(world.count("record on the caller's"), 2u);   // behind the copies, and behind the call
  EXPECT_EQ(world.log.back(), "wait for the copies");     // context may go now
  EXPECT_EQ(world.count("wait for the caller's"), 0u);  // the caller waits when it wants to
  for (void* memory : {x, out, context_out}) gpu.release(memory);
}

TEST(EngineRunner, WithEverythingOnTheGpuACallOnlyQueues) {
  World world;
  auto runner = make(world);
  doubles::Gpu gpu(world);
  const bca::Shape x_shape = {1, 4, 8}, context_shape = {1, 4, 6};
  std::vector<float*> at;
  for (int i = 0; i < 4; ++i) at.push_back(static_cast<float*>(gpu.allocate(4 * 8 * 4)));
  std::fill_n(at[0], 32, 1.0f), std::fill_n(at[1], 32, 1.0f);
  const auto cuda = bca::Memory::Cuda;
  char stream = 0;
  runner->run({{at[0], x_shape, cuda}, {at[1], context_shape, cuda}}, {{at[2], x_shape, cuda}, {at[3], context_shape, cuda}}, &stream);
  EXPECT_EQ(std::count_if(world.log.begin(), world.log.end(), [](const std::string& done) { return done.rfind("wait for", 0) == 0; }), 0);
  for (float* memory : at) gpu.release(memory);
}

TEST(EngineRunner, EndsAfterTheWorkOnACallersStreamAndOnItsDevice) {
  World world;
  auto runner = make(world);
  doubles::Gpu gpu(world);
  const support::Pair pair(1, 4, 4, 3);  // in host memory, and so through buffers of the runner
  auto* out = static_cast<float*>(gpu.allocate(pair.x.bytes()));
  auto* context_out = static_cast<float*>(gpu.allocate(pair.context.bytes()));
  char stream = 0;
  const auto cuda = bca::Memory::Cuda;
  runner->run({pair.x, pair.context}, {{out, {1, 4, 8}, cuda}, {context_out, {1, 4, 6}, cuda}}, &stream);
  world.log.clear();
  runner.reset();
  EXPECT_EQ(world.log, (std::vector<std::string>{"wait for the last call", "free", "free", "engine gone on 0"}));
  for (float* memory : {out, context_out}) gpu.release(memory);
}

TEST(EngineRunner, OnTheCallersStreamHostOutputsAreThereOnReturn) {
  World world;
  auto runner = make(world);
  Request request(4);
  char stream = 0;
  request.run(*runner, &stream);
  EXPECT_TRUE(request.right());
  EXPECT_EQ(world.log.back(), "wait for the caller's");
}

TEST(EngineRunner, ACallOnAnotherStreamWaitsForTheOneBefore) {
  World world;
  auto runner = make(world, 1);
  char stream = 0;
  Request(4).run(*runner, &stream);
  Request(4).run(*runner);
  EXPECT_EQ(world.count("own waits"), 1u);
}

class Refusal : public testing::TestWithParam<const char*> {};

TEST_P(Refusal, IsAnErrorWithTheReasonAndNeverAResultAndTheNextCallIsRight) {
  World world;
  auto runner = make(world, 1);
  Request before(4);
  before.run(*runner);
  world.refuse = GetParam();
  Request failed(std::string(GetParam()) == "allocate" ? 32 : 5, 9);  // a longer one needs memory
  if (world.refuse == "profile") runner = make(world, 1);             // the old one has its profile already
  const std::string message = message_of<bca::EngineError>([&] { failed.run(*runner); });
  const bool by_cuda = world.refuse == "wait" || world.refuse == "allocate";
  EXPECT_HAS(message, by_cuda ? "CUDA failed at " + world.refuse : world.refuse == "output shape" ? "the manifest says" : ": the double was told to");
  EXPECT_TRUE(failed.untouched() || world.refuse == "wait");  // only then has the engine run
  EXPECT_GE(world.count("wait for own"), 2u);  // its copies have ended before its buffers go
  world.refuse = "";
  const int made = world.made_contexts;
  Request after(6, 4);
  after.run(*runner);
  EXPECT_TRUE(after.right());
  EXPECT_EQ(world.made_contexts, made + 1);  // the failed one is not used again
  EXPECT_EQ(world.contexts, 1);
  EXPECT_EQ(world.memory.size(), 4u);
}

INSTANTIATE_TEST_SUITE_P(Steps, Refusal, testing::Values("enqueue", "wait", "shape", "address", "profile", "output shape", "allocate"),
                         [](const auto& step) { std::string name = step.param; return name.substr(0, name.find(' ')); });

TEST(EngineRunner, WhereNoContextIsToBeHadTheErrorSaysSoAndNobodyWaitsForever) {
  World world;
  world.refuse = "context";
  auto runner = make(world, 1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(message_of<bca::EngineError>([&] { Request(4).run(*runner); }), "the engine refused an execution context: the double was told to");
  }
  EXPECT_TRUE(world.streams.empty());
  world.refuse = "";
  Request request(4);
  request.run(*runner);
  EXPECT_TRUE(request.right());
}

TEST(EngineRunner, AnEngineOfOtherElementTypesIsRefusedWhenOpened) {
  World world;
  world.refuse = "dtype";
  EXPECT_HAS(message_of<bca::EngineError>([&] { make(world); }), "the engine's x is float16, the manifest says float32; build the engine again");
}

TEST(EngineRunner, ShapesThatNoProfileHoldsAreRefusedBeforeAnythingIsDone) {
  World world;
  auto runner = make(world);
  EXPECT_HAS(message_of<bca::InputError>([&] { Request(65).run(*runner); }), "no profile of the engine holds x [1, 65, 8], context [1, 65, 6]");
  EXPECT_TRUE(world.log.empty());
}

}  // namespace
