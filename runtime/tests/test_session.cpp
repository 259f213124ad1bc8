// The session on ONNX Runtime, the real one in BCA_ORT_LIBRARY.
#include <xmmintrin.h>

#include <fstream>
#include <thread>

#include "bca/bca.h"
#include "npy.hpp"
#include "support.hpp"

namespace {

using bca::Options;
using bca::Session;
using support::message_of;
using support::Pair;

Options on_cpu(int threads = 1) {
  Options options;
  options.backend = bca::Backend::OnnxRuntimeCpu;
  options.threads = threads;
  return options;
}

/// Whether the calling thread takes denormals for zero.
bool flushes() {
  volatile float tiny = 1e-40f, one = 1;
  return tiny * one == 0;
}

TEST(Session, HoldsTheBundlesOwnBounds) {
  const Session session = Session::open(support::kFixture, on_cpu());
  session.selftest();
}

TEST(Session, SaysWhatRunsAndWhatItTakes) {
  const Session session = Session::open(support::kFixture);
  EXPECT_EQ(session.backend(), bca::Backend::OnnxRuntimeCpu);
  EXPECT_EQ(session.precision(), bca::Precision::Fp32);
  EXPECT_HAS(session.explain().chosen, "onnxruntime-cpu: models/fp32.onnx on onnxruntime 1.");
  ASSERT_EQ(session.explain().passed_over.size(), 3u);
  EXPECT_EQ(session.explain().passed_over[0].first, "tensorrt");
  EXPECT_HAS(session.explain().passed_over[0].second, " has no tensorrt engine; build one: bca build ");
  EXPECT_HAS(session.explain().passed_over[2].second, "this onnxruntime has no CUDA provider");
  EXPECT_EQ(session.inputs().size(), 4u);
  EXPECT_EQ(session.outputs()[1].name, "context_out");
  EXPECT_EQ(session.dims().at("x_len").max, 16);
  EXPECT_HAS(session.describe(), "\"backend\": \"onnxruntime-cpu\"");
}

TEST(Session, ABundleThatDoesNotSayWhatItRestsOnIsTakenOnTrust) {
  const Session session = Session::open(support::kFixture);
  EXPECT_EQ(session.trust(), bca::Trust::OnTrust);
  EXPECT_HAS(session.describe(), "\"trust\": \"on-trust\"");
  EXPECT_HAS(session.describe(), "taken on trust: parity cannot see wrong heads or another forward pass; to prove it, ");
}

TEST(Session, MasksLeftOutAreAllTrue) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(2, 5, 3, 1);
  bca::Tensor mask(bca::DType::Bool, {2, 5}), context_mask(bca::DType::Bool, {2, 3});
  std::fill_n(mask.data<bool>(), 10, true);
  std::fill_n(context_mask.data<bool>(), 6, true);
  const auto out = session.run(pair.inputs());
  const auto full = session.run({{"x", pair.x}, {"context", pair.context}, {"mask", mask}, {"context_mask", context_mask}});
  EXPECT_TRUE(support::near(out.at("out"), full.at("out")));
  EXPECT_EQ(out.at("out").shape(), (bca::Shape{2, 5, 8}));
  mask.data<bool>()[1] = false;
  const auto masked = session.run({{"x", pair.x}, {"context", pair.context}, {"mask", mask}, {"context_mask", context_mask}});
  EXPECT_FALSE(support::near(out.at("context_out"), masked.at("context_out")));
}

TEST(Session, RunIntoWritesTheCallersMemoryAndTheSameResults) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(2, 5, 3, 1);
  bca::Tensor out(bca::DType::Float32, {2, 5, 8}), context_out(bca::DType::Float32, {2, 3, 6});
  session.run_into(pair.inputs(), {{"context_out", context_out}, {"out", out}});
  const auto wanted = session.run(pair.inputs());
  EXPECT_TRUE(support::near(out, wanted.at("out")));
  EXPECT_TRUE(support::near(context_out, wanted.at("context_out")));
}

TEST(Session, OutputsThatDoNotFitAreRefused) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(2, 5, 3, 1);
  bca::Tensor out(bca::DType::Float32, {2, 5, 8}), small(bca::DType::Float32, {2, 3, 5}), half(bca::DType::Float16, {2, 3, 6});
  bca::Tensor right(bca::DType::Float32, {2, 3, 6});
  const auto refused = [&](const bca::OutputViews& views) {
    return message_of<bca::InputError>([&] { session.run_into(pair.inputs(), views); });
  };
  EXPECT_EQ(refused({{"out", out}}), "outputs out were given, and the model has out, context_out");
  EXPECT_EQ(refused({{"out", out}, {"out", out}}), "outputs out, out were given, and the model has out, context_out");
  EXPECT_EQ(refused({{"out", out}, {"context_out", right}, {"attn", right}}), "outputs out, context_out, attn were given, and the model has out, context_out");
  EXPECT_EQ(refused({{"out", out}, {"context_out", small}}),
            "output context_out is [2, 3, 5] float32; a writable, C-contiguous array of [2, 3, 6] float32 is needed");
  EXPECT_HAS(refused({{"out", out}, {"context_out", half}}), "output context_out is [2, 3, 6] float16;");
  EXPECT_HAS(refused({{"out", out}, {"context_out", {static_cast<float*>(nullptr), {2, 3, 6}}}}), "at null");
}

/// The fixture, whose `out` has another axis than x_len.
void set_axis_of_out(const support::BundleCopy& copy, const std::string& axis) {
  const std::string out = "\"name\": \"out\",\n        \"dtype\": \"float32\",\n        \"axes\": [\n          \"batch\",\n          \"";
  copy.replace(out + "x_len", out + axis);
}

TEST(Session, AnOutputMayHaveASizeThatFollowsFromOthers) {
  const support::BundleCopy copy;
  set_axis_of_out(copy, "min(context_len, 1) * (2 * x_len - 1) // 2 + 1");
  const Session session = Session::open(copy.path, on_cpu()), plain = Session::open(support::kFixture, on_cpu());
  const Pair pair(2, 5, 3, 1);
  const auto wanted = plain.run(pair.inputs());
  EXPECT_TRUE(support::near(session.run(pair.inputs()).at("out"), wanted.at("out")));
  bca::Tensor out(bca::DType::Float32, {2, 5, 8}), context_out(bca::DType::Float32, {2, 3, 6}), small(bca::DType::Float32, {2, 4, 8});
  session.run_into(pair.inputs(), {{"out", out}, {"context_out", context_out}});
  EXPECT_TRUE(support::near(out, wanted.at("out")));
  EXPECT_EQ(message_of<bca::InputError>([&] { session.run_into(pair.inputs(), {{"out", small}, {"context_out", context_out}}); }),
            "output out is [2, 4, 8] float32; a writable, C-contiguous array of [2, 5, 8] float32 is needed");
  EXPECT_HAS(session.describe(), "min(context_len, 1) * (2 * x_len - 1) // 2 + 1");
}

TEST(Session, AnOutputThatHasNoSizeIsRefusedInCToo) {
  const support::BundleCopy copy;
  set_axis_of_out(copy, "x_len // (x_len - 5)");
  const Session session = Session::open(copy.path, on_cpu());
  const Pair pair(1, 5, 3, 1);
  const std::string message = "'x_len // (x_len - 5)' divides by 0 at x_len 5; give other sizes";
  EXPECT_EQ(message_of<bca::InputError>([&] { session.run(pair.inputs()); }), message);
  bca_session* opened = nullptr;
  ASSERT_EQ(bca_open(copy.path.c_str(), nullptr, &opened), BCA_OK) << bca_last_error();
  const bca_tensor given[] = {{sizeof(bca_tensor), "x", const_cast<float*>(pair.x.data<float>()), pair.x.shape().data(), 3, BCA_FLOAT32, BCA_CPU},
                              {sizeof(bca_tensor), "context", const_cast<float*>(pair.context.data<float>()), pair.context.shape().data(), 3, BCA_FLOAT32, BCA_CPU}};
  float out[40], context_out[18];
  const std::int64_t out_shape[] = {1, 5, 8}, context_shape[] = {1, 3, 6};
  const bca_tensor outputs[] = {{sizeof(bca_tensor), "out", out, out_shape, 3, BCA_FLOAT32, BCA_CPU}, {sizeof(bca_tensor), "context_out", context_out, context_shape, 3, BCA_FLOAT32, BCA_CPU}};
  EXPECT_EQ(bca_run(opened, given, 2, outputs, 2, nullptr), BCA_INPUT_ERROR);
  EXPECT_EQ(bca_last_error(), message);
  bca_close(opened);
}

TEST(Session, AnOutputOfAnotherSizeThanTheModelMakesIsAnEngineError) {
  const support::BundleCopy copy;
  set_axis_of_out(copy, "x_len + 1");
  const Session session = Session::open(copy.path, on_cpu());
  EXPECT_HAS(message_of<bca::EngineError>([&] { session.run(Pair(1, 5, 3, 1).inputs()); }), "onnxruntime");
}

TEST(Session, GpuMemoryAndStreamsAreRefusedOnTheCpu) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(1, 2, 2, 1);
  float one = 1;
  const bca::View on_gpu(&one, bca::Shape{1, 2, 8}, bca::Memory::Cuda);
  EXPECT_HAS(message_of<bca::InputError>([&] { session.run({{"x", on_gpu}, {"context", pair.context}}); }),
             "input x is on cuda, and this session runs on onnxruntime-cpu, which takes host memory");
  bca::RunOptions options;
  options.stream = &one;
  EXPECT_HAS(message_of<bca::InputError>([&] { session.run(pair.inputs(), options); }), "a stream is given, and this session runs on onnxruntime-cpu");
}

TEST(Session, CastTakesDoublesAndIntegerMasks) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(1, 4, 2, 1);
  bca::Tensor wide(bca::DType::Float64, {1, 4, 8});
  for (std::size_t i = 0; i < wide.count(); ++i) wide.data<double>()[i] = pair.x.data<float>()[i];
  bca::Tensor mask(bca::DType::Int64, {1, 4});
  std::fill_n(mask.data<std::int64_t>(), 4, 1);
  const bca::Inputs inputs = {{"x", wide}, {"context", pair.context}, {"mask", mask}};
  EXPECT_HAS(message_of<bca::InputError>([&] { session.run(inputs); }), "input x has dtype float64, and needs float32; cast=True converts it");
  bca::RunOptions cast;
  cast.cast = true;
  EXPECT_TRUE(support::near(session.run(inputs, cast).at("out"), session.run(pair.inputs()).at("out")));
}

TEST(Session, WarmupRunsTheOptimalSizesOrThoseGiven) {
  const Session session = Session::open(support::kFixture, on_cpu());
  session.warmup();
  session.warmup({{1, 2, 3}, {4, 16, 16}});
  EXPECT_EQ(message_of<bca::InputError>([&] { session.warmup({{1, 2}}); }), "shape 1x2: give 3 sizes, of batch, x_len, context_len");
  EXPECT_HAS(message_of<bca::InputError>([&] { session.warmup({{1, 17, 3}}); }), "input x: axis 1 (x_len) is 17, allowed 1 to 16; a sequence cannot be cut");
}

TEST(Session, SizesAreCheckedBeforeMemoryIsAskedFor) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const auto refused = [&](std::int64_t batch, std::int64_t x_len, std::int64_t context_len) {
    const std::string message = message_of<bca::InputError>([&] { session.warmup({{batch, x_len, context_len}}); });
    EXPECT_EQ(message_of<bca::InputError>([&] { session.zeros({batch, x_len, context_len}); }), message);
    return message;
  };
  EXPECT_HAS(refused(1, 1'000'000'000'000, 1), "input x: axis 1 (x_len) is 1000000000000, allowed 1 to 16; ");
  EXPECT_HAS(refused(1, 1, 1'000'000'000'000), "input context: axis 1 (context_len) is 1000000000000, allowed 1 to 16; ");
  EXPECT_HAS(refused(-1, 4, 4), "input x: axis 0 (batch) is -1, allowed 1 to 4; ");
  EXPECT_EQ(session.zeros({1, 2, 3})[1].second.shape(), (bca::Shape{1, 3, 6}));
}

TEST(Session, OutputsThatOverlapAnythingAreRefused) {
  const Session session = Session::open(support::kFixture, on_cpu());
  Pair pair(1, 4, 4, 1);
  std::vector<float> memory(32 + 24);
  const auto run = [&](float* out, float* context_out) {
    return message_of<bca::InputError>([&] { session.run_into(pair.inputs(), {{"out", {out, {1, 4, 8}}}, {"context_out", {context_out, {1, 4, 6}}}}); });
  };
  const std::string advice = " in memory; give each output memory of its own";
  EXPECT_EQ(run(memory.data(), memory.data() + 31), "output context_out overlaps output out" + advice);
  EXPECT_EQ(run(memory.data() + 23, memory.data()), "output context_out overlaps output out" + advice);
  EXPECT_EQ(run(pair.x.data<float>(), memory.data()), "output out overlaps input x" + advice);
  EXPECT_EQ(run(memory.data(), pair.context.data<float>()), "output context_out overlaps input context" + advice);
  EXPECT_EQ(run(memory.data(), memory.data() + 32), "no error");  // side by side
}

TEST(Session, OpeningAndRunningLeaveTheCallersFloatingPointModeAlone) {
  ASSERT_FALSE(flushes());
  const Session session = Session::open(support::kFixture, on_cpu(2));
  EXPECT_FALSE(flushes());
  const Pair pair(4, 16, 16, 1);
  session.run(pair.inputs());
  EXPECT_FALSE(flushes());
  EXPECT_HAS(message_of<bca::InputError>([&] { session.run({}); }), "input x is missing");
  EXPECT_FALSE(flushes());
  bool inherited = true;
  std::thread([&] { inherited = flushes(); }).join();
  EXPECT_FALSE(inherited);
}

TEST(Session, ACallerThatFlushesAlreadyGoesOnFlushing) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 1u << 15 | 1u << 6);
  const Session session = Session::open(support::kFixture, on_cpu());
  session.run(Pair(1, 2, 2, 1).inputs());
  EXPECT_TRUE(flushes());
  _mm_setcsr(before);
}

TEST(Session, ANamedBackendNeverFallsBack) {
  Options options;
  options.backend = bca::Backend::TensorRT;
  EXPECT_HAS(message_of<bca::EngineError>([&] { Session::open(support::kFixture, options); }), " has no tensorrt engine; build one: ");
  options.backend = bca::Backend::Rtx;
  EXPECT_HAS(message_of<bca::EngineError>([&] { Session::open(support::kFixture, options); }), " has no rtx engine; build one: ");
  options.backend = bca::Backend::OnnxRuntimeCuda;
  EXPECT_HAS(message_of<bca::EngineError>([&] { Session::open(support::kFixture, options); }), "this onnxruntime has no CUDA provider");
}

TEST(Session, TooFewOrTooManyThreadsOrContextsAreRefused) {
  Options options = on_cpu(-1);
  const auto refused = [&] { return message_of<bca::InputError>([&] { Session::open(support::kFixture, options); }); };
  EXPECT_EQ(refused(), "threads is -1; it must be at least 1 and at most 1024, or 0 for every core");
  options = on_cpu(1025);
  EXPECT_EQ(refused(), "threads is 1025; it must be at least 1 and at most 1024, or 0 for every core");
  options = on_cpu();
  options.contexts = 0;
  EXPECT_EQ(refused(), "contexts is 0; it must be at least 1");
}

TEST(Session, EnumeratorsOutOfRangeAreRefused) {
  const auto refused = [](const Options& options) { return message_of<bca::InputError>([&] { Session::open(support::kFixture, options); }); };
  Options options = on_cpu();
  options.backend = static_cast<bca::Backend>(99);
  EXPECT_EQ(refused(options), "backend is 99; allowed: 0 auto, 1 tensorrt, 2 rtx, 3 onnxruntime-cuda, 4 onnxruntime-cpu");
  options = on_cpu(), options.precision = static_cast<bca::Precision>(99);
  EXPECT_EQ(refused(options), "precision is 99; allowed: 0 fp32, 1 fp16, 2 bf16");
  options = on_cpu(), options.verify = static_cast<bca::Verify>(-1);
  EXPECT_EQ(refused(options), "verify is -1; allowed: 0 full, 1 size, 2 off");
  EXPECT_HAS(message_of<bca::InputError>([] { bca::name_of(static_cast<bca::Backend>(-1)); }), "backend is -1; allowed: 0 auto, ");
  EXPECT_HAS(message_of<bca::InputError>([] { bca::name_of(static_cast<bca::Precision>(3)); }), "precision is 3; allowed: 0 fp32, ");
}

TEST(Session, TensorsOfUnknownTypesOrMemoryAreRefused) {
  const Session session = Session::open(support::kFixture, on_cpu());
  const Pair pair(1, 4, 2, 1);
  const auto no_type = static_cast<bca::DType>(13);
  const auto no_memory = static_cast<bca::Memory>(2);
  bca::RunOptions cast;
  cast.cast = true;
  const auto refused = [&](const bca::View& x) {
    return message_of<bca::InputError>([&] { session.run({{"x", x}, {"context", pair.context}}, cast); });
  };
  EXPECT_HAS(refused({pair.x.data(), no_type, {1, 4, 8}}), "input x: its element type is 13; allowed: 0 float32, 1 float16, ");
  EXPECT_EQ(refused({pair.x.data(), bca::DType::Float32, {1, 4, 8}, no_memory}), "input x: its memory is 2; allowed: 0 cpu, 1 cuda");
  bca::Tensor out(bca::DType::Float32, {1, 4, 8}), context_out(bca::DType::Float32, {1, 2, 6});
  const auto refused_into = [&](const bca::MutableView& view) {
    return message_of<bca::InputError>([&] { session.run_into(pair.inputs(), {{"out", view}, {"context_out", context_out}}); });
  };
  EXPECT_HAS(refused_into({out.data(), no_type, {1, 4, 8}}), "output out: its element type is 13; allowed: 0 float32, ");
  EXPECT_EQ(refused_into({out.data(), bca::DType::Float32, {1, 4, 8}, no_memory}), "output out: its memory is 2; allowed: 0 cpu, 1 cuda");
  EXPECT_HAS(message_of<bca::InputError>([&] { bca::Tensor(no_type, {1}); }), "element type is 13; allowed: 0 float32, ");
  EXPECT_HAS(message_of<bca::InputError>([&] { bca::size_of(static_cast<bca::DType>(-1)); }), "element type is -1; allowed: 0 float32, ");
}

TEST(Session, PrecisionsThatAreNotThereAreRefused) {
  Options options = on_cpu();
  options.precision = bca::Precision::Bf16;
  EXPECT_EQ(message_of<bca::InputError>([&] { Session::open(support::kFixture, options); }),
            "onnxruntime has no bfloat16 products on the CPU; open with precision='fp32' or 'fp16', or on a GPU");
  options.precision = bca::Precision::Fp16;
  EXPECT_EQ(message_of<bca::InputError>([&] { Session::open(support::kFixture, options); }),
            "precision fp16 is not in the bundle, which has fp32; export it with --precision fp16");
}

TEST(Session, ALibraryThatIsNotThereOrIsAnotherIsNamed) {
  Options options = on_cpu();
  options.onnxruntime_library = "/nowhere/libonnxruntime.so";
  EXPECT_HAS(message_of<bca::MissingDependencyError>([&] { Session::open(support::kFixture, options); }), "onnxruntime does not load (/nowhere/libonnxruntime.so: ");
  options.onnxruntime_library = "libz.so.1";
  EXPECT_HAS(message_of<bca::MissingDependencyError>([&] { Session::open(support::kFixture, options); }), "it has no OrtGetApiBase");
  options.backend = bca::Backend::Auto;
  EXPECT_HAS(message_of<bca::EngineError>([&] { Session::open(support::kFixture, options); }), "nothing here runs this bundle: tensorrt: ");
}

TEST(Session, AModelThatOnnxruntimeCannotReadIsABundleError) {
  const support::BundleCopy copy;
  copy.write("models/fp32.onnx", "no model");
  Options options = on_cpu();
  options.verify = bca::Verify::Off;
  EXPECT_HAS(message_of<bca::BundleError>([&] { Session::open(copy.path, options); }), "onnxruntime does not open " + copy.path.string());
}

TEST(Session, ABundleOutOfItsBoundsFailsTheSelftest) {
  const support::BundleCopy copy;
  std::string arrays = copy.read("selftest.npz");
  const std::string name = "fp32/no-mask/bound/out.npy";
  ASSERT_NE(arrays.find(name), std::string::npos);
  // Tell the reader another precision's name, so that none is left of this model's.
  for (std::size_t at; (at = arrays.find("fp32/")) != std::string::npos;) arrays.replace(at, 4, "fp64");
  copy.write("selftest.npz", arrays);
  Options options = on_cpu();
  options.verify = bca::Verify::Off;
  EXPECT_EQ(message_of<bca::ParityError>([&] { Session::open(copy.path, options).selftest(); }), "self-test: no case of precision fp32, so nothing is proven");
}

TEST(Session, ASelftestThatIsDamagedIsABundleError) {
  Options options = on_cpu();
  options.verify = bca::Verify::Off;
  for (const std::string content : {"", "PK\x03\x04 no zip", "cut"}) {
    const support::BundleCopy copy;
    copy.write("selftest.npz", content == "cut" ? copy.read("selftest.npz").substr(0, 5000) : content);
    const std::string message = message_of<bca::BundleError>([&] { Session::open(copy.path, options).selftest(); });
    EXPECT_HAS(message, (copy.path / "selftest.npz").string() + " is no readable .npz file: ");
    EXPECT_HAS(message, "; copy or export the bundle again");
  }
}

TEST(Session, APathThatIsNotUtf8IsAsGoodAsAny) {
  const support::TemporaryDirectory directory;
  const auto place = directory.path / "caf\xe9";
  support::fs::copy(support::kFixture, place, support::fs::copy_options::recursive);
  const Session session = Session::open(place, on_cpu());
  session.selftest();
  EXPECT_HAS(session.describe(), "onnxruntime-cpu");
}

TEST(Session, MovesAndEndsOnce) {
  Session first = Session::open(support::kFixture, on_cpu());
  Session second = std::move(first);
  first = Session::open(support::kFixture, on_cpu());
  EXPECT_TRUE(support::near(first.run(Pair(1, 2, 2, 1).inputs()).at("out"), second.run(Pair(1, 2, 2, 1).inputs()).at("out")));
}

}  // namespace
