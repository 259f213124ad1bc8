// The profile whose optimal sizes are nearest runs a request; stale engines are refused.
#include "engines.hpp"
#include "profiles.hpp"
#include "support.hpp"

namespace {

using support::message_of;

const std::vector<bca::TensorInfo> kInputs = {{"x", bca::DType::Float16, {"batch", "x_len", std::int64_t{8}}, {}}};

bca::ShapeRange range(std::int64_t min, std::int64_t opt, std::int64_t max) { return {{1, min, 8}, {1, opt, 8}, {1, max, 8}}; }

std::size_t chosen(const std::vector<bca::Profile>& profiles, std::int64_t length) {
  return bca::choose_profile(profiles, kInputs, {{1, length, 8}});
}

TEST(Profiles, TheNearestOptimumWinsAndNotTheFirstThatFits) {
  const std::vector<bca::Profile> profiles = {{range(1, 512, 2048)}, {range(1, 64, 2048)}};
  EXPECT_EQ(chosen(profiles, 64), 1u);
  EXPECT_EQ(chosen(profiles, 2000), 0u);
  EXPECT_EQ(chosen(profiles, 180), 1u);  // between them as ratios: 181
  EXPECT_EQ(chosen(profiles, 182), 0u);
}

TEST(Profiles, OneThatDoesNotHoldTheShapeIsNoChoiceHoweverNear) {
  EXPECT_EQ(chosen({{range(1, 60, 63)}, {range(1, 1024, 2048)}}, 64), 1u);
}

TEST(Profiles, WhereNoneHoldsTheShapeTheErrorListsThem) {
  EXPECT_EQ(message_of<bca::InputError>([] { chosen({{range(1, 2, 4)}, {range(8, 8, 16)}}, 6); }),
            "no profile of the engine holds x [1, 6, 8]; it has: x [1, 1, 8] to [1, 4, 8]; x [1, 8, 8] to [1, 16, 8]");
}

bca::Bundle bundle() {
  bca::Bundle made{"build/model", {}};
  const std::string hash(64, 'a');
  bca::EngineEntry entry;
  entry.file = "engines/rtx-fp16.engine", entry.library = "rtx", entry.version = "1.7.1.116", entry.model = "models/fp16.onnx";
  entry.model_sha256 = hash, entry.precision = bca::Precision::Fp16, entry.targets = {"sm89", "sm120"};
  entry.profiles = {{{"batch", {1, 4, 8}}, {"x_len", {16, 512, 2048}}, {"context_len", {1, 512, 1024}}},
                    {{"batch", {1, 1, 16}}, {"x_len", {1, 64, 128}}, {"context_len", {1, 64, 128}}}};
  made.manifest.engines = {entry};
  made.manifest.files["models/fp16.onnx"] = {1, hash};
  return made;
}

std::string refused(const bca::Bundle& given, const std::string& loaded, const std::string& gpu) {
  return message_of<bca::EngineError>([&] { bca::usable_engine(given, "rtx", loaded, gpu, {}); });
}

TEST(Engines, OneForThisLibraryAndGpuIsUsable) {
  EXPECT_EQ(bca::usable_engine(bundle(), "rtx", "1.7.1.116", "sm89", {}).file, "engines/rtx-fp16.engine");
  EXPECT_EQ(bca::usable_engine(bundle(), "rtx", "1.7.1.116", "sm120", bca::Precision::Fp16).file, "engines/rtx-fp16.engine");
}

TEST(Engines, AStaleOneIsRefusedWithTheReason) {
  EXPECT_HAS(refused(bundle(), "1.8.0.1", "sm89"), "engines/rtx-fp16.engine is stale: it was built by rtx 1.7.1.116, and 1.8.0.1 is installed");
  EXPECT_HAS(refused(bundle(), "1.7.1.116", "sm90"), "it was built for sm89, sm120, and the GPU is sm90");
  bca::Bundle changed = bundle();
  changed.manifest.files["models/fp16.onnx"].sha256 = std::string(64, 'b');
  EXPECT_HAS(refused(changed, "1.7.1.116", "sm89"), "models/fp16.onnx has changed since it was built");
}

TEST(Engines, AVersionCompatibleOneLoadsInLaterVersionsOnly) {
  bca::Bundle compatible = bundle();
  compatible.manifest.engines[0].version_compatible = true;
  EXPECT_EQ(refused(compatible, "1.10.0.2", "sm89"), "no error");
  EXPECT_HAS(refused(compatible, "1.6.9.9", "sm89"), "is installed");
}

TEST(Engines, OneBuiltOnAGpuIsForThatGenerationUnlessItIsAmperePlus) {
  bca::Bundle built = bundle();
  built.manifest.engines[0].targets = {};
  built.manifest.engines[0].gpu_capability = "sm90";
  EXPECT_EQ(refused(built, "1.7.1.116", "sm90"), "no error");
  EXPECT_HAS(refused(built, "1.7.1.116", "sm89"), "it was built for sm90, and the GPU is sm89");
  built.manifest.engines[0].hardware_compatibility = "ampere_plus";
  EXPECT_EQ(refused(built, "1.7.1.116", "sm120"), "no error");
  EXPECT_HAS(refused(built, "1.7.1.116", "sm75"), "the GPU is sm75");
}

TEST(Engines, WhereThereIsNoneTheCommandIsNamed) {
  EXPECT_EQ(message_of<bca::EngineError>([] { bca::check_has_engine(bundle(), "tensorrt", {}); }),
            "build/model has no tensorrt engine; build one: bca build build/model --engine tensorrt");
  EXPECT_EQ(message_of<bca::EngineError>([] { bca::usable_engine(bundle(), "rtx", "1.7.1.116", "sm89", bca::Precision::Bf16); }),
            "build/model has no rtx engine of precision bf16; build one: bca build build/model --engine rtx --precision bf16");
}

TEST(Engines, ItsDimsAreThoseOfAllProfilesTogether) {
  const bca::Dims dims = bca::hull(bundle().manifest.engines[0].profiles);
  EXPECT_EQ(dims.at("batch").max, 16);
  EXPECT_EQ(dims.at("x_len").min, 1);
  EXPECT_EQ(dims.at("x_len").max, 2048);
  EXPECT_EQ(dims.at("context_len").max, 1024);
  EXPECT_EQ(dims.at("x_len").opt, 512);
}

}  // namespace
