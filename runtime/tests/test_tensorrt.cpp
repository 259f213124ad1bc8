// From a bundle with an engine to its outputs, through the code that talks to TensorRT and CUDA; the two libraries behind it are
// doubles (fake_tensorrt.cpp, fake_cuda.cpp). Nothing here says that a real engine runs: that takes a GPU.
#include "library.hpp"
#include "sha256.hpp"
#include "support.hpp"

namespace {

using bca::Session;
using support::message_of;
using support::Pair;

constexpr const char* kDims = R"({"batch": {"min": 1, "opt": 2, "max": 4}, "x_len": {"min": 1, "opt": 4, "max": 8}, "context_len": {"min": 1, "opt": 4, "max": 8}},
  {"batch": {"min": 1, "opt": 2, "max": 4}, "x_len": {"min": 4, "opt": 12, "max": 16}, "context_len": {"min": 4, "opt": 12, "max": 16}})";

/// The fixture with an engine whose plan is "fake engine" and more words.
struct EngineBundle : support::BundleCopy {
  explicit EngineBundle(const std::string& plan = "fake engine", const std::string& version = BCA_TENSORRT_VERSION, const std::string& gpu = "sm89") {
    support::fs::create_directory(path / "engines");
    write("engines/trt.engine", plan);
    const std::string model_sha = bca::sha256_of(path / "models/fp32.onnx"), sha = bca::sha256_of(path / "engines/trt.engine");
    replace("\"engines\": []", R"("engines": [{"file": "engines/trt.engine", "library": "tensorrt", "version": ")" + version +
      R"(", "model": "models/fp32.onnx", "model_sha256": ")" + model_sha + R"(", "precision": "fp32", "targets": [], "gpu": {"name": "A GPU", "compute_capability": ")" + gpu +
      R"("}, "profiles": [)" + kDims + R"(], "options": {"version_compatible": false, "hardware_compatibility": "none"}}])");
    replace("\"files\": {", R"("files": {"engines/trt.engine": {"bytes": )" + std::to_string(plan.size()) + R"(, "sha256": ")" + sha + "\"},");
  }
};

bca::Options on_tensorrt() {
  bca::Options options;
  options.backend = bca::Backend::TensorRT;
  options.tensorrt_library = BCA_FAKE_TENSORRT;
  options.cuda_library = BCA_FAKE_CUDA;
  return options;
}

std::string refused(const EngineBundle& bundle, const bca::Options& options = on_tensorrt()) {
  return message_of<bca::EngineError>([&] { Session::open(bundle.path, options); });
}

TEST(TensorRT, RunsAnEngineUnderEachOfItsProfiles) {
  const EngineBundle bundle;
  const Session session = Session::open(bundle.path, on_tensorrt());
  EXPECT_EQ(session.explain().chosen, std::string("tensorrt: engines/trt.engine on tensorrt ") + BCA_TENSORRT_VERSION);
  EXPECT_EQ(session.dims().at("x_len").max, 16);
  for (const std::int64_t length : {1, 4, 8, 9, 16, 3}) {
    const Pair pair(2, length, length, 1);
    const auto outputs = session.run(pair.inputs());
    for (std::size_t i = 0; i < pair.x.count(); ++i) ASSERT_EQ(outputs.at("out").data<float>()[i], 2 * pair.x.data<float>()[i]);
    for (std::size_t i = 0; i < pair.context.count(); ++i) ASSERT_EQ(outputs.at("context_out").data<float>()[i], 3 * pair.context.data<float>()[i]);
  }
}

TEST(TensorRT, MasksReachTheEngine) {
  const EngineBundle bundle;
  const Session session = Session::open(bundle.path, on_tensorrt());
  const Pair pair(1, 3, 3, 1);
  const bool mask[] = {true, false, true};
  const auto outputs = session.run({{"x", pair.x}, {"context", pair.context}, {"mask", {mask, {1, 3}}}});
  EXPECT_EQ(outputs.at("out").data<float>()[8], 0);
  EXPECT_EQ(outputs.at("out").data<float>()[16], 2 * pair.x.data<float>()[16]);
}

TEST(TensorRT, TheCallersGpuMemoryAndStreamAreTaken) {
  const EngineBundle bundle;
  const Session session = Session::open(bundle.path, on_tensorrt());
  const Pair pair(1, 4, 4, 1);
  alignas(256) float x[64], out[64], context_out[64];  // host memory plays the GPU's in these doubles
  std::copy_n(pair.x.data<float>(), 32, x);
  int stream = 0;  // of device 0
  bca::RunOptions options;
  options.stream = &stream;
  const auto cuda = bca::Memory::Cuda;
  const auto run = [&](float* from, float* to, float* context_to) {
    session.run_into({{"x", {from, {1, 4, 8}, cuda}}, {"context", pair.context}},
                     {{"out", {to, {1, 4, 8}, cuda}}, {"context_out", {context_to, {1, 4, 6}, cuda}}}, options);
  };
  run(x, out, context_out);
  EXPECT_EQ(out[31], 2 * pair.x.data<float>()[31]);
  const std::string reason = " lies 16 bytes beyond a multiple of 256, and engines take GPU memory at multiples alone; copy it to the start of an allocation";
  EXPECT_EQ(message_of<bca::InputError>([&] { run(x + 4, out, context_out); }), "input x" + reason);
  EXPECT_EQ(message_of<bca::InputError>([&] { run(x, out, context_out + 4); }), "output context_out" + reason);
  EXPECT_HAS(message_of<bca::InputError>([&] { run(x, out, out); }), "output context_out overlaps output out in memory");
  EXPECT_HAS(message_of<bca::InputError>([&] { run(x, x, context_out); }), "output out overlaps input x in memory");
}

TEST(TensorRT, EverythingIsDoneOnTheDeviceAskedFor) {
  const support::Variable two("FAKE_GPUS", "2");
  const EngineBundle bundle;
  bca::Options options = on_tensorrt();
  options.device = 1;
  const Session session = Session::open(bundle.path, options);
  const Pair pair(1, 4, 4, 1), longer(1, 16, 16, 2);
  EXPECT_EQ(session.run(pair.inputs()).at("out").data<float>()[31], 2 * pair.x.data<float>()[31]);
  EXPECT_EQ(session.run(longer.inputs()).at("context_out").data<float>()[95], 3 * longer.context.data<float>()[95]);
  int stream = 1;  // of device 1: the double refuses it on another
  bca::RunOptions on_stream;
  on_stream.stream = &stream;
  EXPECT_EQ(session.run(pair.inputs(), on_stream).at("out").data<float>()[31], 2 * pair.x.data<float>()[31]);
  int left = -1;
  bca::function_of<int (*)(int*)>(bca::open_library("the double", {BCA_FAKE_CUDA}, ""), "the double", "cudaGetDevice")(&left);
  EXPECT_EQ(left, 0);  // the thread's own device again
}

TEST(TensorRT, ShapesBetweenTheProfilesAreRefused) {
  const EngineBundle bundle;
  const Session session = Session::open(bundle.path, on_tensorrt());
  EXPECT_HAS(message_of<bca::InputError>([&] { session.run(Pair(1, 2, 16, 1).inputs()); }), "no optimization profile of the engine holds batch 1, x_len 2, context_len 16; it has batch 1 to 4, x_len 1 to 8, ");
}

TEST(TensorRT, AutoTakesTheEngineAndWithoutAGpuSaysWhyNot) {
  const EngineBundle bundle;
  bca::Options options = on_tensorrt();
  options.backend = bca::Backend::Auto;
  EXPECT_EQ(Session::open(bundle.path, options).backend(), bca::Backend::TensorRT);
  setenv("FAKE_GPUS", "0", 1);
  const Session session = Session::open(bundle.path, options);
  EXPECT_EQ(session.backend(), bca::Backend::OnnxRuntimeCpu);
  EXPECT_EQ(session.explain().passed_over[0].second, "no GPU: no CUDA-capable device is detected");
  EXPECT_EQ(refused(bundle), "no GPU: no CUDA-capable device is detected");  // a named one never falls back
  unsetenv("FAKE_GPUS");
  options = on_tensorrt();
  options.device = 1;
  EXPECT_EQ(refused(bundle, options), "no GPU 1: this machine has 1, counted from 0");
}

TEST(TensorRT, WhatIsStaleDamagedOrForAnotherGpuIsRefusedWithTheReason) {
  EXPECT_HAS(refused(EngineBundle("fake engine", "10.1.0.1")), "engines/trt.engine is stale: it was built by tensorrt 10.1.0.1, and " BCA_TENSORRT_VERSION " is installed");
  EXPECT_HAS(refused(EngineBundle("fake engine", BCA_TENSORRT_VERSION, "sm90")), "it was built for sm90, and the GPU is sm89");
  EXPECT_HAS(refused(EngineBundle("rubbish")), "engines/trt.engine does not open here: the plan's magic tag does not match");
  EXPECT_HAS(refused(EngineBundle("fake engine half")), "the engine's x is float16, the manifest says float32; build the engine again");
}

TEST(TensorRT, CodeOfAnEngineForTheCpuIsRefusedUnlessAsked) {
  const EngineBundle bundle("fake engine host-code");
  EXPECT_HAS(refused(bundle), "engines/trt.engine does not open here: the engine has host code, which is not allowed");
  bca::Options options = on_tensorrt();
  options.host_code = true;
  EXPECT_EQ(Session::open(bundle.path, options).backend(), bca::Backend::TensorRT);
}

TEST(TensorRT, AFailedCallIsAnErrorInTheLibrarysWords) {
  const EngineBundle failing("fake engine no-enqueue"), full("fake engine no-context");
  const auto error = [](const EngineBundle& bundle) {
    const Session session = Session::open(bundle.path, on_tensorrt());
    return message_of<bca::EngineError>([&] { session.run(Pair(1, 2, 2, 1).inputs()); });
  };
  EXPECT_EQ(error(failing), "the engine refused the call: enqueueV3: told to fail");
  EXPECT_EQ(error(full), "the engine refused an execution context: no memory for a context");
}

TEST(TensorRT, LibrariesThatAreNotThereAreNamed) {
  const EngineBundle bundle;
  const auto missing = [&](const bca::Options& options) {
    return message_of<bca::MissingDependencyError>([&] { Session::open(bundle.path, options); });
  };
  bca::Options options = on_tensorrt();
  options.tensorrt_library = "/nowhere/libnvinfer.so";
  EXPECT_HAS(missing(options), "tensorrt does not load (/nowhere/libnvinfer.so: ");
  options = on_tensorrt();
  options.cuda_library = "libz.so.1";
  EXPECT_HAS(missing(options), "the library given as CUDA's runtime is not that: it has no cudaGetErrorString");
}

}  // namespace
