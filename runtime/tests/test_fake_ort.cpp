// What only a library that does as it is told can show: a run that fails, a CUDA provider without a GPU, and the options it gets.
#include <nlohmann/json.hpp>

#include "support.hpp"

namespace {

bca::Options on_fake() {
  bca::Options options;
  options.onnxruntime_library = BCA_FAKE_ORT;
  options.verify = bca::Verify::Off;
  return options;
}

TEST(FakeOrt, ARunThatFailsIsAnErrorWithTheFirstLineOfTheReason) {
  const support::BundleCopy copy;
  copy.write("models/fp32.onnx", "fails");
  const bca::Session session = bca::Session::open(copy.path, on_fake());
  EXPECT_EQ(support::message_of<bca::EngineError>([&] { session.run(support::Pair(1, 2, 2, 1).inputs()); }),
            "onnxruntime failed on x [1, 2, 8], context [1, 2, 6], mask [1, 2], context_mask [1, 2]: the fake was told to");
}

TEST(FakeOrt, OneBinaryServesWhicheverLibraryItIsGiven) {
  const bca::Session session = bca::Session::open(support::kFixture, on_fake());
  EXPECT_HAS(session.explain().chosen, "on onnxruntime 1.0.fake");
  const support::Pair pair(1, 2, 2, 1);
  EXPECT_EQ(session.run(pair.inputs()).at("out").data<float>()[3], 2 * pair.x.data<float>()[3]);
}

TEST(FakeOrt, ALibraryThatIsTooOldIsRefused) {
  bca::Options options = on_fake();
  options.backend = bca::Backend::OnnxRuntimeCpu;
  setenv("FAKE_ORT_API", "17", 1);
  EXPECT_EQ(support::message_of<bca::MissingDependencyError>([&] { bca::Session::open(support::kFixture, options); }),
            "onnxruntime 1.0.fake is too old; version 1.18 or later is needed");
  setenv("FAKE_ORT_API", "18", 1);
  EXPECT_EQ(bca::Session::open(support::kFixture, options).backend(), bca::Backend::OnnxRuntimeCpu);
  unsetenv("FAKE_ORT_API");
}

TEST(FakeOrt, DenormalsAreZeroWhileTheModelRunsAndNowhereElse) {
  const bca::Session session = bca::Session::open(support::kFixture, on_fake());
  const support::Pair pair(1, 2, 2, 1);
  bca::Tensor tiny(bca::DType::Float32, {1, 2, 8});
  std::fill_n(tiny.data<float>(), tiny.count(), 1e-40f);
  const auto outputs = session.run({{"x", tiny}, {"context", pair.context}});
  EXPECT_EQ(outputs.at("out").data<float>()[0], 0.0f);
  volatile float still = tiny.data<float>()[0], two = 2;
  EXPECT_GT(still * two, 0.0f);
}

/// The options that a session gets, a line each.
std::string options_given(const bca::Options& options, const support::fs::path& bundle = support::kFixture) {
  const support::TemporaryDirectory directory;
  const support::Variable log("FAKE_ORT_LOG", directory.path / "log");
  bca::Session::open(bundle, options);
  return bca::bytes::read(directory.path / "log");
}

TEST(FakeOrt, OnTheCpuThreadsFlushAndSpinAsTheOptionsSay) {
  bca::Options options = on_fake();
  options.threads = 3;
  EXPECT_EQ(options_given(options), "threads 3\nsession.set_denormal_as_zero 1\nsession.intra_op.allow_spinning 1\n");
  options.spinning = false;
  EXPECT_HAS(options_given(options), "session.intra_op.allow_spinning 0\n");
}

bca::Options on_cuda() {
  bca::Options options = on_fake();
  options.backend = bca::Backend::OnnxRuntimeCuda;
  return options;
}

TEST(FakeOrt, TheCudaProviderGetsTheDevice) {
  const support::Variable cuda("FAKE_ORT_CUDA", "1");
  bca::Options options = on_cuda();
  options.device = 3;
  EXPECT_EQ(options_given(options), "threads 0\ndevice_id 3\non CUDA\n");
}

/// The precision that CUDA picks where the bundle has these.
bca::Precision picked(const std::vector<std::string>& precisions) {
  const support::BundleCopy copy;
  auto manifest = nlohmann::ordered_json::parse(copy.read("manifest.json"));
  auto model = manifest["models"][0];
  manifest["models"].clear();
  for (const std::string& precision : precisions) {
    model["precision"] = precision;
    manifest["models"].push_back(model);
  }
  copy.write("manifest.json", manifest.dump());
  return bca::Session::open(copy.path, on_cuda()).precision();
}

TEST(FakeOrt, OnCudaHalvesAreTakenFirstAndSinglesLast) {
  const support::Variable cuda("FAKE_ORT_CUDA", "1");
  EXPECT_EQ(picked({"fp32", "bf16", "fp16"}), bca::Precision::Fp16);
  EXPECT_EQ(picked({"fp32", "bf16"}), bca::Precision::Bf16);
  EXPECT_EQ(picked({"fp32"}), bca::Precision::Fp32);
}

TEST(FakeOrt, AModelThatDoesNotOpenIsTheBundlesFaultOnTheCpuAndTheBackendsOnCuda) {
  const support::Variable cuda("FAKE_ORT_CUDA", "1");
  const support::BundleCopy copy;
  copy.write("models/fp32.onnx", "does not open");
  const std::string message = "onnxruntime does not open " + (copy.path / "models/fp32.onnx").string() + ": the fake was told to";
  EXPECT_EQ(support::message_of<bca::EngineError>([&] { bca::Session::open(copy.path, on_cuda()); }), message);
  bca::Options options = on_fake();
  options.backend = bca::Backend::OnnxRuntimeCpu;
  EXPECT_EQ(support::message_of<bca::BundleError>([&] { bca::Session::open(copy.path, options); }), message);
}

}  // namespace
