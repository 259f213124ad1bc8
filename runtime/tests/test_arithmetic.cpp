// The table of expressions that Python and C++ are both held to, and what an output's axes may be.
#include "arithmetic.hpp"

#include <nlohmann/json.hpp>

#include "signature.hpp"
#include "support.hpp"
#include "text.hpp"

namespace {

using bca::Axis;
using bca::arithmetic::names_in;
using bca::arithmetic::value_of;
using json = nlohmann::ordered_json;
using support::message_of;
using Names = std::set<std::string>;

const json& table() {
  static const json parsed = json::parse(bca::bytes::read(support::kRepository / "tests/arithmetic_cases.json"));
  return parsed;
}

bca::Sizes sizes() { return table()["sizes"].get<bca::Sizes>(); }

TEST(Arithmetic, ExpressionsAreWhatTheTableSays) {
  for (const json& entry : table()["values"]) {
    const auto expression = entry[0].get<std::string>();
    EXPECT_EQ(value_of(expression, sizes()), entry[1].get<std::int64_t>()) << expression;
  }
}

TEST(Arithmetic, WhatIsNoExpressionIsRefusedInPythonsWords) {
  for (const json& entry : table()["no_size"]) {
    const auto expression = entry.get<std::string>();
    const std::string message = bca::text::quoted(expression) +
                                " is no size: give a number, a dimension, or an expression of them with + - * // %, min, max and "
                                "parentheses, of at most 400 bytes";
    EXPECT_EQ(message_of<bca::InputError>([&] { names_in(expression); }), message);
    EXPECT_EQ(message_of<bca::InputError>([&] { value_of(expression, sizes()); }), message);
  }
}

TEST(Arithmetic, AnExpressionWithoutAValueSaysWhyAndAtWhichSizes) {
  for (const json& entry : table()["no_value"]) {
    const auto expression = entry[0].get<std::string>();
    EXPECT_EQ(message_of<bca::InputError>([&] { value_of(expression, sizes()); }),
              "'" + expression + "' " + entry[1].get<std::string>() + "; give other sizes");
  }
}

TEST(Arithmetic, TheNamesAreThoseOfDimensionsAndNotOfFunctions) {
  EXPECT_EQ(names_in("min(a, 2 * b) // (a - max)"), (Names{"a", "b", "max"}));
  EXPECT_EQ(names_in("12"), Names{});
}

TEST(Arithmetic, AnOutputsAxisIsADimensionBeforeItIsAnExpression) {
  const std::vector<Axis> axes = {"rows", "rows * 2 - 1", std::int64_t{5}, "rows * 3"};
  EXPECT_EQ(bca::shape_at(axes, {{"rows", 4}, {"rows * 3", 7}}), (bca::Shape{4, 7, 5, 7}));
  EXPECT_EQ(message_of<bca::InputError>([&] { bca::shape_at({"rows // (rows - 4)"}, {{"rows", 4}}); }),
            "'rows // (rows - 4)' divides by 0 at rows 4; give other sizes");
}

/// A batch of rows, a mask over them, and one output.
bca::Signature signature(std::vector<Axis> output, bca::DType mask = bca::DType::Bool) {
  const std::vector<Axis> rows = {"batch", "rows"};
  return {{{"table", bca::DType::Float32, rows, {}}, {"kept", mask, rows, 1.0}},
          {{"found", bca::DType::Float32, std::move(output), {}}},
          {{"batch", {1, 2, 4}}, {"rows", {1, 8, 16}}},
          "batch",
          {{"rows", "kept"}}};
}

TEST(Arithmetic, AnOutputsAxisIsOfKnownDimensionsOrTheSignatureIsRefused) {
  EXPECT_EQ(fault_of(signature({"batch", "(rows - 1) // 2 + 1", "12"})), "");
  EXPECT_EQ(fault_of(signature({"batch", "rows * columns"})), "dimension columns needs a range, and an input that has it and must be given");
  EXPECT_HAS(fault_of(signature({"batch", "rows / 2"})), "'rows / 2' is no size: give a number, a dimension, or an expression of them");
  bca::Signature of_inputs = signature({"batch"});
  of_inputs.inputs[0].axes[1] = "rows * 2";
  EXPECT_EQ(fault_of(of_inputs), "dimension rows needs a range, and an input that has it and must be given") << "what inputs have is named";
}

TEST(Arithmetic, AMaskIsOfBoolsOrIntegers) {
  for (const auto dtype : {bca::DType::Bool, bca::DType::Int32, bca::DType::Int64}) EXPECT_EQ(fault_of(signature({"batch"}, dtype)), "");
  for (const auto dtype : {bca::DType::Float32, bca::DType::BFloat16}) {
    EXPECT_EQ(fault_of(signature({"batch"}, dtype)), "kept cannot mask rows; a mask is a bool or integer input over ['batch', 'rows']");
  }
  bca::Signature alone = signature({"rows"});
  alone.batch = "";
  EXPECT_EQ(fault_of(alone), "kept cannot mask rows; a mask is a bool or integer input over ['rows']");
}

}  // namespace
