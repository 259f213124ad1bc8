// The judgement of the self-test: bounds hold or do not, NaN never does.
#include <cmath>

#include "selftest.hpp"
#include "support.hpp"

namespace {

bca::Tensor one(bca::DType dtype, double value) {
  bca::Tensor made(dtype, {1});
  if (dtype == bca::DType::Float64) *made.data<double>() = value;
  else *made.data<float>() = static_cast<float>(value);
  return made;
}

std::vector<std::string> judged(double got, double bound) {
  bca::selftest::Arrays arrays;
  arrays.emplace("fp32/case/input/x", one(bca::DType::Float32, 2));
  arrays.emplace("fp32/case/output/out", one(bca::DType::Float64, 4));
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

}  // namespace
