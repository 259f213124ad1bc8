// What only a library that does as it is told can show: a run that fails.
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

}  // namespace
