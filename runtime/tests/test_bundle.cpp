// A bundle that is damaged, unsafe or too new does not open, and the message names what and why.
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "sha256.hpp"
#include "support.hpp"

namespace {

using bca::Verify;
using support::BundleCopy;
using support::message_of;

std::string refused(const support::fs::path& path, Verify verify = Verify::Full) {
  return message_of<bca::BundleError>([&] { bca::open_bundle(path, verify); });
}

TEST(Bundle, OfFormat1OpensWithItsModelsAndDims) {
  const bca::Bundle bundle = bca::open_bundle(support::kFixture, Verify::Full);
  ASSERT_EQ(bundle.manifest.models.size(), 1u);
  const bca::ModelEntry& model = bundle.manifest.models[0];
  EXPECT_EQ(model.file, "models/fp32.onnx");
  EXPECT_EQ(model.precision, bca::Precision::Fp32);
  const bca::Signature signature = bca::signature_of(bundle.manifest, model);
  ASSERT_EQ(signature.inputs.size(), 4u);
  EXPECT_EQ(signature.inputs[2].dtype, bca::DType::Bool);
  EXPECT_EQ(signature.inputs[2].fill, 1.0);
  EXPECT_FALSE(signature.inputs[0].fill);
  EXPECT_EQ(std::get<std::string>(signature.inputs[0].axes[1]), "x_len");
  EXPECT_EQ(std::get<std::int64_t>(signature.inputs[0].axes[2]), 8);
  EXPECT_EQ(signature.dims.at("batch").max, 4);
  EXPECT_EQ(signature.dims[1].first, "x_len") << "in the manifest's order";
  EXPECT_EQ(signature.batch, "batch");
  EXPECT_EQ(signature.masks.at("context_len"), "context_mask");
  bca::ModelEntry half = model;
  half.precision = bca::Precision::Fp16, half.keep_io_types = false;
  const bca::Signature halves = bca::signature_of(bundle.manifest, half);
  EXPECT_EQ(halves.inputs[0].dtype, bca::DType::Float16);
  EXPECT_EQ(halves.inputs[2].dtype, bca::DType::Bool);
  EXPECT_EQ(bundle.path("models/fp32.onnx"), support::kFixture / "models/fp32.onnx");
  EXPECT_HAS(message_of<bca::BundleError>([&] { bundle.path("nothing"); }), "the bundle has no nothing; it has expect.npz, ");
}

TEST(Bundle, AChangedByteIsFoundByItsHashUnlessHashesAreOff) {
  const BundleCopy copy;
  std::string model = copy.read("models/fp32.onnx");
  model[model.size() / 2] ^= 1;
  copy.write("models/fp32.onnx", model);
  EXPECT_EQ(refused(copy.path), "models/fp32.onnx has changed since the export (its sha256 differs from the manifest's); export the bundle again");
  EXPECT_EQ(refused(copy.path, Verify::Size), "no error");
  EXPECT_EQ(refused(copy.path, Verify::Off), "no error");
}

TEST(Bundle, AnotherSizeIsFoundUnlessChecksAreOff) {
  const BundleCopy copy;
  const std::string model = copy.read("models/fp32.onnx");
  copy.write("models/fp32.onnx", model + "x");
  EXPECT_HAS(refused(copy.path, Verify::Size), "models/fp32.onnx has " + std::to_string(model.size() + 1) + " bytes, the manifest says " + std::to_string(model.size()));
  EXPECT_EQ(refused(copy.path, Verify::Off), "no error");
}

TEST(Bundle, AMissingFileIsNamedWhateverIsChecked) {
  const BundleCopy copy;
  support::fs::remove(copy.path / "weights.safetensors");
  for (const Verify verify : {Verify::Full, Verify::Size, Verify::Off}) {
    EXPECT_HAS(refused(copy.path, verify), "weights.safetensors is missing from " + copy.path.string());
  }
}

TEST(Bundle, UnsafeNamesAreRefused) {
  for (const std::string name : {"../out", "/etc/passwd", "models/../../out", "a\\\\b", "a\\u0000b", "", "."}) {
    const BundleCopy copy;
    copy.replace("\"expect.npz\"", "\"" + name + "\"");
    EXPECT_HAS(refused(copy.path, Verify::Off), "unsafe path") << name;
  }
}

TEST(Bundle, ALinkThatLeadsOutIsRefusedAndOneInsideIsNot) {
  const BundleCopy copy;
  support::fs::rename(copy.path / "expect.npz", copy.path.parent_path() / "outside.npz");
  support::fs::create_symlink(copy.path.parent_path() / "outside.npz", copy.path / "expect.npz");
  EXPECT_HAS(refused(copy.path), "unsafe path 'expect.npz': it is a link that leads out of the bundle; do not use this bundle");
  support::fs::remove(copy.path / "expect.npz");
  support::fs::rename(copy.path.parent_path() / "outside.npz", copy.path / "models/kept.npz");
  support::fs::create_symlink("models/kept.npz", copy.path / "expect.npz");
  EXPECT_EQ(refused(copy.path), "no error");
}

TEST(Bundle, AManifestThatIsALinkIsJudgedAsAnyFile) {
  const BundleCopy copy;
  support::fs::rename(copy.path / "manifest.json", copy.path.parent_path() / "outside.json");
  support::fs::create_symlink("../outside.json", copy.path / "manifest.json");
  EXPECT_HAS(refused(copy.path), "unsafe path 'manifest.json': it is a link that leads out of the bundle; do not use this bundle, or if you know where its links lead, copy it");
  support::fs::rename(copy.path.parent_path() / "outside.json", copy.path / "models/kept.json");
  support::fs::remove(copy.path / "manifest.json");
  support::fs::create_symlink("models/kept.json", copy.path / "manifest.json");
  EXPECT_EQ(refused(copy.path), "no error");
}

TEST(Bundle, NamesThatNoSystemHasAreRefusedInOneShortSentence) {
  const std::string name(5000, 'n'), shown = name.substr(0, 40) + "... (5000 characters)";
  const auto short_and_with = [](const std::string& got, const std::string& part) {
    EXPECT_HAS(got, part);
    EXPECT_LT(got.size(), 400u);
  };
  const auto changed = [](const std::string& from, const std::string& to) {
    const BundleCopy copy;
    copy.replace(from, to);
    return refused(copy.path);
  };
  short_and_with(changed("\"expect.npz\"", "\"" + name + "\""), "no system has a file named " + shown + "; do not use this bundle");
  const std::string nested = "\"" + std::string(2100, 'd').replace(1, 2098, std::string(2098, '/')) + "/" + std::string(2100, '/') + "d\"";
  EXPECT_HAS(changed("\"expect.npz\"", nested), "no system has a file named d////");
  short_and_with(changed("\"name\": \"x\"", "\"name\": \"" + name + "\""), "the name " + name.substr(0, 40) + "... has 5000 bytes; at most 255");
  const BundleCopy copy;
  copy.replace("\"file\": \"models/fp32.onnx\"", "\"file\": \"" + name + "\"");
  const bca::Bundle bundle = bca::open_bundle(copy.path, Verify::Size);
  short_and_with(message_of<bca::BundleError>([&] { bundle.path(bundle.manifest.models[0].file); }), "the bundle has no " + shown + "; it has expect.npz, ");
}

TEST(Bundle, AFileThatTheSystemDoesNotShowIsNamed) {
  for (const std::string name : {"manifest.json", "weights.safetensors"}) {
    const BundleCopy copy;
    support::fs::remove(copy.path / name);
    support::fs::create_symlink(name, copy.path / name);
    EXPECT_HAS(refused(copy.path), (copy.path / name).string() + " cannot be read: ");
  }
}

TEST(Bundle, ADirectoryWithoutAManifestAndAnArchiveSayWhatToDo) {
  const BundleCopy copy;
  EXPECT_HAS(refused(copy.path / "models"), "is not a bundle: it has no manifest.json; it is in the bundle " + copy.path.string());
  const support::fs::path above = copy.path.parent_path() / "above";
  support::fs::create_directories(above / "empty");
  EXPECT_HAS(refused(above / "empty"), "is not a bundle: it has no manifest.json; make one with bca-export --out " + (above / "empty").string());
  EXPECT_HAS(refused(above), "make one with bca-export --out " + (above / "model").string());  // --out takes no folder with other files
  support::fs::copy(copy.path, above / "mine", support::fs::copy_options::recursive);
  EXPECT_HAS(refused(above), "is not a bundle: it has no manifest.json; bundles are in it: " + (above / "mine").string());
  EXPECT_HAS(refused("/nowhere/at/all"), "is not a bundle");
  const support::fs::path before = support::fs::current_path();
  support::fs::current_path(copy.path);
  EXPECT_EQ(refused("."), "no error");
  EXPECT_EQ(refused(""), "the bundle's path is empty; give its directory, '.' for this one");
  support::fs::current_path(before);
  EXPECT_HAS(refused(copy.path / "manifest.json"), "is a file, and this runtime opens directories; unpack it first: unzip");
}

TEST(Manifest, ANewerFormatIsRefusedAsNewer) {
  const BundleCopy copy;
  copy.replace("\"format\": 1", "\"format\": 2");
  EXPECT_HAS(refused(copy.path), "is a bundle of format 2, newer than the formats this version reads (up to 1); upgrade");
}

struct Change {
  const char *from, *to, *message;
};

TEST(Manifest, AWrongFieldIsNamedWithTheWayToIt) {
  const Change changes[] = {
      {"\"format\": 1", "\"format\": 0", "field format: Input should be 1"},
      {"\"format\": 1", "\"format\": \"1\"", "field format: Input should be a valid integer"},
      {"\"format\"", "\"fromat\"", "field format: Field required"},
      {"\"dims\"", "\"dimms\"", "field signature.dimms: is unknown; allowed: inputs, outputs, dims, batch, masks"},
      {"\"min\": 1", "\"min\": 3", "field signature.dims.batch: needs 1 <= min <= opt <= max"},
      {"\"min\": 1", "\"min\": 0", "field signature.dims.batch.min: Input should be greater than or equal to 1"},
      {"\"min\": 1", "\"min\": 18446744073709551615", "field signature.dims.batch.min: Input should be a valid integer"},
      {"\"min\": 1", "\"min\": 1.5", "field signature.dims.batch.min: Input should be a valid integer"},
      {"\"batch\": \"batch\"", "\"batch\": \"x\"", "field signature: dimension x needs a range"},
      {"\"x_len\": \"mask\"", "\"x_len\": \"context_mask\"", "field signature: context_mask cannot mask x_len; a mask is a bool or integer input over ['batch', 'x_len']"},
      {"\"name\": \"out\"", "\"name\": \"x\"", "field signature: x is the name of two tensors; give each its own"},
      {"\"fill\": null", "\"fill\": \"zero\"", "field signature.inputs.0.fill: Input should be a valid number"},
      {"\"fill\": null", "\"full\": null", "field signature.inputs.0.full: is unknown; allowed: name, dtype, axes, fill"},
      {"\"runtime\": \"portable\"", "\"runtime\": \"other\"", "field models.0.runtime: Input should be one of portable, onnxruntime-cpu"},
      {"\"precision\": \"fp32\"", "\"precision\": \"fp8\"", "field models.0.precision: Input should be one of fp32, fp16, bf16"},
      {"\"dtype\": \"float32\"", "\"dtype\": \"int8\"", "field signature.inputs.0.dtype: Input should be one of"},
      {"\"x_len\",\n          8", "\"x_lem\",\n          8", "field signature: dimension x_lem needs a range, and an input that has it and must be given"},
      {"\"x_len\",\n          8", "\"x_len\",\n          -8", "field signature.inputs.0.axes.2: Input should be greater than or equal to 1"},
      {"\"outputs\": [", "\"outputs\": [{\"name\": \"y\", \"dtype\": \"float32\", \"axes\": [\"x_len +\"], \"fill\": null},",
       "field signature: 'x_len +' is no size: give a number, a dimension, or an expression of them"},
      {"\"outputs\": [", "\"outputs\": [{\"name\": \"y\", \"dtype\": \"float32\", \"axes\": [\"x_len * rows\"], \"fill\": null},",
       "field signature: dimension rows needs a range, and an input that has it and must be given"},
      {"\"models\": [", "\"models\": [], \"moddels\": [", "field models: List should have at least 1 item"},
      {"\"engines\": []", "\"engines\": {}", "field engines: Input should be a valid list"},
      {"\"sha256\": \"", "\"sha256\": \"z", "String should match pattern '^[0-9a-f]{64}$'"},
      {"\"bytes\": ", "\"bytes\": -", "Input should be greater than or equal to 0"},
      {"\"files\": {", "\"files\": [], \"others\": {", "field files: Input should be an object"},
  };
  for (const Change& change : changes) {
    const BundleCopy copy;
    copy.replace(change.from, change.to);
    EXPECT_HAS(refused(copy.path), change.message) << change.to;
    EXPECT_HAS(refused(copy.path), (copy.path / "manifest.json").string()) << change.to;
  }
}

using json = nlohmann::ordered_json;

/// What the case has in place of what.
std::pair<std::string, std::string> change_of(const json& table, const json& given) {
  if (!given.contains("engine")) return {given["from"], given["to"]};
  json engine = table["engine"];
  engine.update(given["engine"]);
  return {"\"engines\": []", "\"engines\": [" + engine.dump() + "]"};
}

TEST(Manifest, IsTakenOrRefusedAsTheTableOfBothLanguagesSays) {
  const json table = json::parse(bca::bytes::read(support::kRepository / "tests/bundle_cases.json"));
  for (const json& given : table["manifest"]) {
    const BundleCopy copy;
    const auto [from, to] = change_of(table, given);
    copy.replace(from, to);
    const std::string got = refused(copy.path, Verify::Size);
    if (given["error"].is_null()) EXPECT_EQ(got, "no error") << given["case"];
    else EXPECT_HAS(got, given["error"].get<std::string>()) << given["case"];
  }
}

TEST(Manifest, WhatIsNotJsonIsSaidToBeNone) {
  const BundleCopy copy;
  for (const std::string text : {"", "{", "[1, 2", "\xff\xfe", "nul"}) {
    copy.write("manifest.json", text);
    EXPECT_HAS(refused(copy.path), "is not JSON") << text;
  }
  copy.write("manifest.json", "[]");
  EXPECT_HAS(refused(copy.path), "field : Input should be an object");
  copy.write("manifest.json", std::string(200'000, '['));  // depth without end
  EXPECT_HAS(refused(copy.path), "is not JSON");
}

}  // namespace
