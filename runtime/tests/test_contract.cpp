// The table of requests that Python and C++ are both held to, and what only C++ callers can get wrong.
#include <cmath>
#include <nlohmann/json.hpp>

#include "cast.hpp"
#include "contract.hpp"
#include "support.hpp"
#include "text.hpp"

namespace {

using json = nlohmann::ordered_json;
using support::message_of;

const json& table() {
  static const json parsed = json::parse(bca::bytes::read(support::kRepository / "tests/contract_cases.json"));
  return parsed;
}

bca::DimRange range(const json& given) { return {given["min"], given["opt"], given["max"]}; }

std::vector<bca::Axis> axes(const json& given) {
  std::vector<bca::Axis> found;
  for (const json& axis : given) {
    found.push_back(axis.is_string() ? bca::Axis(axis.get<std::string>()) : bca::Axis(axis.get<std::int64_t>()));
  }
  return found;
}

std::optional<double> fill(const json& tensor) {
  if (!tensor.contains("fill")) return std::nullopt;
  return tensor["fill"].is_boolean() ? (tensor["fill"].get<bool>() ? 1 : 0) : tensor["fill"].get<double>();
}

bca::Dims dims(const json& given) {
  bca::Dims found;
  for (const auto& [name, sizes] : given.items()) found.emplace_back(name, range(sizes));
  return found;
}

bca::Signature model(const std::string& name, const json& changes = json::object()) {
  const json& given = table()["models"][name];
  json sizes = given.value("dims", table()["dims"]);
  sizes.update(changes);
  bca::Signature signature{{}, {}, dims(sizes), given.value("batch", "batch"), {}};
  for (const json& t : given["inputs"]) signature.inputs.push_back({t["name"], bca::dtype_of(t["dtype"]), axes(t["axes"]), fill(t)});
  const json masks = given.value("masks", json::object());  // a name of its own: a loop keeps no temporary alive
  for (const auto& [dim, mask] : masks.items()) signature.masks[dim] = mask.get<std::string>();
  return signature;
}

/// `changes`: dims other than the model's.
bca::Contract contract(const std::string& name, const std::string& profiles = "", const json& changes = json::object()) {
  std::vector<bca::Dims> each;
  if (!profiles.empty()) {
    for (const json& profile : table()["profiles"][profiles]) each.push_back(dims(profile));
  }
  const auto left_out = table()["models"][name].value("left_out", std::map<std::string, std::string>());
  return bca::Contract(model(name, changes), each, left_out);
}

template <typename T> void set_all(bca::Tensor& array, T value) {
  for (std::size_t i = 0; i < array.count(); ++i) std::memcpy(static_cast<char*>(array.data()) + i * sizeof(T), &value, sizeof(T));
}

bca::Tensor array(const json& given) {
  bca::Tensor made(bca::dtype_of(given.value("dtype", "float32")), given["shape"].get<bca::Shape>());
  const double fill = given.value("fill", 1.0);
  switch (made.dtype()) {
    case bca::DType::Float32: set_all(made, static_cast<float>(fill)); break;
    case bca::DType::Float64: set_all(made, fill); break;
    case bca::DType::Float16: set_all(made, bca::half_of(fill)); break;
    case bca::DType::BFloat16: set_all(made, bca::bfloat16_of(fill)); break;
    case bca::DType::Int32: set_all(made, static_cast<std::int32_t>(fill)); break;
    case bca::DType::UInt8: set_all(made, static_cast<std::uint8_t>(fill)); break;
    case bca::DType::Int64: set_all(made, static_cast<std::int64_t>(fill)); break;
    default: set_all(made, static_cast<std::int8_t>(fill)); break;
  }
  return made;
}

class ContractTable : public testing::TestWithParam<std::size_t> {};

TEST_P(ContractTable, TakesOrRefusesInTheTablesWords) {
  const json& given = table()["cases"][GetParam()];
  SCOPED_TRACE(given["case"].get<std::string>());
  std::vector<bca::Tensor> arrays;
  arrays.reserve(8);
  bca::Inputs inputs;
  for (const auto& [name, entry] : given["inputs"].items()) inputs.emplace_back(name, arrays.emplace_back(array(entry)));
  const auto check = [&] { return contract(given["model"], given.value("profiles", ""), given.value("dims", json::object())).check(inputs, given.value("cast", false)); };
  if (!given["error"].is_null()) {
    EXPECT_EQ(message_of<bca::InputError>(check), given["error"].get<std::string>());
    return;
  }
  const bca::Ready ready = check();
  const auto tensors = model(given["model"]).inputs;
  ASSERT_EQ(ready.views.size(), tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(ready.views[i].dtype, tensors[i].dtype);
    EXPECT_EQ(ready.views[i].shape, bca::shape_at(tensors[i].axes, ready.sizes));
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ContractTable, testing::Range<std::size_t>(0, table()["cases"].size()));

bca::Tensor ones(const bca::Shape& shape) {
  bca::Tensor made(bca::DType::Float32, shape);
  set_all(made, 1.0f);
  return made;
}

TEST(Contract, WhatFitsIsPassedOnWithoutACopyAndMasksLeftOutAreAllTrue) {
  const bca::Tensor x = ones({2, 5, 24}), context = ones({2, 3, 16});
  const bca::Ready ready = contract("masks").check({{"context", context}, {"x", x}}, false);
  EXPECT_EQ(ready.views[0].data, x.data());
  EXPECT_EQ(ready.views[1].data, context.data());
  EXPECT_EQ(ready.views[2].shape, (bca::Shape{2, 5}));
  EXPECT_EQ(ready.views[3].shape, (bca::Shape{2, 3}));
  for (int mask : {2, 3}) {
    for (std::size_t i = 0; i < bca::count_of(ready.views[mask].shape); ++i) EXPECT_TRUE(static_cast<const bool*>(ready.views[mask].data)[i]);
  }
}

TEST(Contract, ANameGivenTwiceIsRefused) {
  const bca::Tensor x = ones({2, 5, 24});
  EXPECT_EQ(message_of<bca::InputError>([&] { contract("masks").check({{"x", x}, {"x", x}}, false); }), "input x is given twice");
}

TEST(Contract, ANullPointerIsRefused) {
  const bca::Tensor context = ones({2, 3, 16});
  const auto refused = [&](bca::DType dtype, std::int64_t length) {
    const bca::View nothing(nullptr, dtype, {2, length, 24});
    return message_of<bca::InputError>([&] { contract("masks").check({{"x", nothing}, {"context", context}}, true); });
  };
  EXPECT_HAS(refused(bca::DType::Float32, 5), "input x has no memory: its pointer is null");
  EXPECT_HAS(refused(bca::DType::Float64, 5), "input x has no memory: its pointer is null");
  EXPECT_EQ(refused(bca::DType::Float32, 0), "input x: axis 1 (x_len) is 0, allowed 2 to 16; nothing attends to an empty sequence; leave its entry out");  // an empty vector's
}

TEST(Contract, ABoolThatIsNeitherZeroNorOneIsRefused) {
  const bca::Tensor x = ones({2, 5, 24}), context = ones({2, 3, 16});
  bca::Tensor mask = bca::Tensor::zeros(bca::DType::Bool, {2, 5});
  static_cast<unsigned char*>(mask.data())[7] = 255;
  const auto check = [&] { contract("masks").check({{"x", x}, {"context", context}, {"mask", mask}}, false); };
  EXPECT_EQ(message_of<bca::InputError>(check), "input mask: a bool is one byte of 0 or 1, and here is one of 255; write 1 where it is true");
}

TEST(Contract, NegativeAndEndlessSizesAreRefused) {
  const float one = 1;
  const auto check = [&](bca::Shape shape, bool cast) {
    const bca::View view(&one, bca::DType::Float32, std::move(shape));
    return message_of<bca::InputError>([&] { contract(cast ? "half" : "masks").check({{"x", view}}, cast); });
  };
  EXPECT_HAS(check({2, -5, 24}, false), "input x: axis 1 (x_len) is -5, allowed 2 to 16");
  EXPECT_HAS(check({INT64_MAX, INT64_MAX, 24}, true), "input x: axis 0 (batch) is 9223372036854775807, allowed 1 to 4");
  EXPECT_EQ(message_of<bca::InputError>([] { bca::count_of({2, -5}); }), "shape [2, -5] has a negative size");
  EXPECT_EQ(message_of<bca::InputError>([] { bca::count_of({INT64_MAX, 2}); }), "shape [9223372036854775807, 2] is more than memory can hold");
}

// Every float16 there is, through float64 and back; then the numbers half way between two of them.
TEST(Cast, HalvesRoundToNearestEven) {
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    ASSERT_EQ(bca::half_of(bca::from_half(half)), half);
    ASSERT_EQ(bca::half_of(-bca::from_half(half)), half | 0x8000);
    if (bits == 0x7bff) break;
    const double middle = (bca::from_half(half) + bca::from_half(half + 1)) / 2;
    ASSERT_EQ(bca::half_of(middle), bits % 2 ? half + 1 : half);
    ASSERT_EQ(bca::half_of(std::nextafter(middle, INFINITY)), half + 1);
    ASSERT_EQ(bca::half_of(std::nextafter(middle, 0)), half);
  }
  EXPECT_EQ(bca::half_of(65519), 0x7bff);
  EXPECT_EQ(bca::half_of(65520), 0x7c00);
  EXPECT_TRUE(std::isnan(bca::from_half(bca::half_of(NAN))));
}

TEST(Cast, ANumberThatBecomesInfiniteIsRefusedBesideOneThatIs) {
  const bca::TensorInfo half{"x", bca::DType::Float16, {std::int64_t{3}}};
  const float fits[] = {INFINITY, NAN, 65504}, lost[] = {INFINITY, -70000, 66000};
  const auto cast = [&](const float* values) { return bca::cast_to(half, {values, {3}}, true); };
  EXPECT_EQ(bca::as_doubles(cast(fits))[0], INFINITY);
  EXPECT_EQ(message_of<bca::InputError>([&] { cast(lost); }), "input x holds 7e+04, more than float16 can; scale it down");
}

TEST(Cast, OnTheGpuTheCallerConverts) {
  const std::int64_t anything = 0;
  const bca::TensorInfo single{"x", bca::DType::Float32, {std::int64_t{1}}}, mask{"mask", bca::DType::Bool, {std::int64_t{1}}};
  const auto refused = [&](const bca::TensorInfo& input, bca::DType dtype, bool cast) {
    return message_of<bca::InputError>([&] { bca::cast_to(input, {&anything, dtype, {1}, bca::Memory::Cuda}, cast); });
  };
  for (const bool cast : {false, true}) {
    EXPECT_EQ(refused(single, bca::DType::Float16, cast), "input x has dtype float16, and needs float32; convert it on the GPU");
    EXPECT_EQ(refused(mask, bca::DType::Int64, cast), "input mask has dtype int64, and needs bool; convert it on the GPU");
    EXPECT_EQ(refused(single, bca::DType::Int32, cast), "input x has dtype int32, and needs float32");
  }
}

TEST(Contract, AMaskIsSpreadOverWhatTheOthersHave) {
  const bca::Tensor x(bca::DType::Float32, {2, 3, 24}), context(bca::DType::Float32, {2, 2, 16});
  const bool by_length[] = {true, false, true}, by_entry[] = {false, true};
  const bca::Inputs inputs{{"x", x}, {"context", context}, {"mask", {by_length, bca::DType::Bool, {1, 3}}},
                           {"context_mask", {by_entry, bca::DType::Bool, {2, 1}}}};
  const bca::Ready ready = contract("masks").check(inputs, false);
  EXPECT_EQ(bca::as_doubles(ready.views[2]), (std::vector<double>{1, 0, 1, 1, 0, 1}));
  EXPECT_EQ(bca::as_doubles(ready.views[3]), (std::vector<double>{0, 0, 1, 1}));
}

TEST(Contract, OnTheGpuTheCallerSpreadsAMask) {
  const bca::Tensor x(bca::DType::Float32, {2, 3, 24}), context(bca::DType::Float32, {2, 2, 16});
  const bool anything[1] = {};
  const bca::Inputs inputs{{"x", x}, {"context", context}, {"mask", {anything, bca::DType::Bool, {1, 3}, bca::Memory::Cuda}}};
  EXPECT_EQ(message_of<bca::InputError>([&] { contract("masks").check(inputs, false); }),
            "input mask is [1, 3] on the GPU, and needs [2, 3]; expand it there");
}

TEST(Cast, AMaskNamesTheFirstThatIsNeitherZeroNorOne) {
  const std::int64_t values[] = {1, 0, -3, 9};
  const bca::TensorInfo mask{"mask", bca::DType::Bool, {std::int64_t{4}}};
  EXPECT_EQ(message_of<bca::InputError>([&] { bca::cast_to(mask, {values, {4}}, true); }),
            "input mask: a mask of integers must hold 0 and 1 alone, and it holds -3");
}

TEST(Cast, BrainFloatsRoundToNearestEven) {
  EXPECT_EQ(bca::bfloat16_of(1.0), 0x3f80);
  EXPECT_EQ(bca::bfloat16_of(1.00390625), 0x3f80);   // half way, down to even
  EXPECT_EQ(bca::bfloat16_of(1.01171875), 0x3f82);   // half way, up to even
  EXPECT_EQ(bca::bfloat16_of(-2.5), 0xc020);
  EXPECT_TRUE(std::isnan(bca::from_bfloat16(bca::bfloat16_of(NAN))));
  EXPECT_EQ(bca::from_bfloat16(0x4049), 3.140625);
}

TEST(Names, UnknownOnesGetTheNearest) {
  EXPECT_EQ(bca::backend_of("onnxruntime-cpu"), bca::Backend::OnnxRuntimeCpu);
  EXPECT_EQ(message_of<bca::InputError>([] { bca::backend_of("tensort"); }),
            "backend 'tensort' is not known (did you mean 'tensorrt'?); allowed: auto, tensorrt, rtx, onnxruntime-cuda, onnxruntime-cpu");
  EXPECT_HAS(message_of<bca::InputError>([] { bca::dtype_of("flota32"); }), "(did you mean 'float32'?)");
}

TEST(Names, OneThatIsTooLongToBeAMistakeIsComparedWithNone) {
  const std::string name(300, 'x');
  EXPECT_EQ(bca::text::nearest(name, {name + "y"}), "");
  EXPECT_EQ(bca::text::nearest(name.substr(200), {name.substr(199)}), " (did you mean '" + name.substr(199) + "'?)");
}

}  // namespace
