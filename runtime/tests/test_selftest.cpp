// The judgement of the self-test: bounds hold or do not, NaN never does.
#include <cmath>

#include <nlohmann/json.hpp>

#include "selftest.hpp"
#include "support.hpp"

namespace {

bca::Tensor one(bca::DType dtype, double value) {
  bca::Tensor made(dtype, {1});
  if (dtype == bca::DType::Float64) *made.data<double>() = value;
  else *made.data<float>() = static_cast<float>(value);
  return made;
}

std::vector<std::string> judged(double got, double bound, double truth = 4) {
  bca::selftest::Arrays arrays;
  arrays.emplace("fp32/case/input/x", one(bca::DType::Float32, 2));
  arrays.emplace("fp32/case/output/out", one(bca::DType::Float64, truth));
  arrays.emplace("fp32/case/bound/out", one(bca::DType::Float64, bound));
  return bca::selftest::failures(arrays, "fp32", [&](const bca::Inputs& inputs) {
    EXPECT_EQ(inputs.size(), 1u);
    EXPECT_EQ(*static_cast<const float*>(inputs[0].second.data), 2.0f);
    bca::Outputs outputs;
    outputs.emplace("out", one(bca::DType::Float32, got));
    return outputs;
  });
}

TEST(Selftest, WithinTheBoundsThereIsNothingToSay) { EXPECT_TRUE(judged(4.25, 0.25).empty()); }

TEST(Selftest, OutOfBoundsTheOutputTheErrorAndTheBoundAreNamed) {
  ASSERT_EQ(judged(4.5, 0.25).size(), 1u);
  EXPECT_EQ(judged(4.5, 0.25)[0], "self-test fp32/case: out is off by 0.5, allowed 0.25");
}

TEST(Selftest, NaNAndAMissingOutputNeverPass) {
  EXPECT_EQ(judged(NAN, 1e30)[0], "self-test fp32/case: out is off by inf, allowed 1e+30");
  bca::selftest::Arrays arrays;
  arrays.emplace("fp32/case/output/out", one(bca::DType::Float64, 4));
  arrays.emplace("fp32/case/bound/out", one(bca::DType::Float64, 1));
  EXPECT_EQ(bca::selftest::failures(arrays, "fp32", [](const bca::Inputs&) { return bca::Outputs(); }).size(), 1u);
}

TEST(Selftest, WhatIsInfiniteIsTheSameInfinity) {
  EXPECT_TRUE(judged(-INFINITY, 0.25, -INFINITY).empty());
  for (const double got : {-1e30, double(INFINITY), double(NAN)}) EXPECT_EQ(judged(got, 0.25, -INFINITY).size(), 1u) << got;
  EXPECT_EQ(judged(-INFINITY, 1e30).size(), 1u);
}

using json = nlohmann::ordered_json;

bca::Tensor filled(const json& given) {
  bca::Tensor made(bca::dtype_of(given["dtype"]), given["shape"].get<bca::Shape>());
  const double fill = given.value("fill", 0.0);
  for (std::size_t i = 0; i < made.count(); ++i) {
    if (made.dtype() == bca::DType::Float64) made.data<double>()[i] = fill;
    else made.data<float>()[i] = static_cast<float>(fill);
  }
  return made;
}

bca::selftest::Arrays changed(const json& given) {
  bca::selftest::Arrays arrays = bca::selftest::read(support::kFixture / "selftest.npz");
  const std::string drop = given.value("drop", "none");
  for (auto at = arrays.begin(); at != arrays.end();) at = at->first.rfind(drop, 0) == 0 ? arrays.erase(at) : std::next(at);
  if (given.contains("put")) arrays.insert_or_assign(given["put"]["name"].get<std::string>(), filled(given["put"]));
  return arrays;
}

/// As Session::selftest does it, for arrays that no file holds.
std::string outcome(const bca::Session& session, const json& given) {
  const auto run = [&](const bca::Inputs& inputs) { return session.run(inputs, {true, nullptr}); };
  try {
    const auto failures = bca::selftest::failures(changed(given), "fp32", run);
    return failures.empty() ? "" : "parity: " + failures.front();
  } catch (const bca::BundleError& error) {
    return error.what();
  }
}

TEST(Selftest, IsRunOrRefusedAsTheTableOfBothLanguagesSays) {
  const json table = json::parse(bca::bytes::read(support::kRepository / "tests/bundle_cases.json"));
  bca::Options options;
  options.backend = bca::Backend::OnnxRuntimeCpu;
  options.threads = 1;
  const bca::Session session = bca::Session::open(support::kFixture, options);
  for (const json& given : table["selftest"]) {
    const std::string got = outcome(session, given);
    const std::string wanted = given["error"].is_null() ? "" : (given.value("parity", false) ? "parity: " : "") + given["error"].get<std::string>();
    EXPECT_EQ(got.substr(0, wanted.empty() ? got.size() : wanted.size()), wanted) << given["case"];
  }
}

}  // namespace
