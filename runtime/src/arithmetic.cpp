#include "arithmetic.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <vector>

#include "bca/errors.hpp"
#include "text.hpp"

namespace bca::arithmetic {
namespace {

constexpr std::size_t kLongestBytes = 400;  // the reader calls itself, and this bounds how deep

enum class Op { Number, Name, Negate, Add, Subtract, Multiply, Divide, Modulo, Min, Max };

struct Step {
  Op op;
  std::int64_t number = 0;
  std::string name = {};
};

/// Why there is no value.
struct NoValue {
  std::string what;
};

bool is_digit(char c) { return '0' <= c && c <= '9'; }

/// Beyond ASCII anything may be part of a name: one that no dimension has is refused as such.
bool starts_name(char c) {
  return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || c == '_' || static_cast<unsigned char>(c) > 127;
}

/// Python reads with its own reader, to which these are no names.
bool is_reserved(const std::string& name) {
  static const std::set<std::string> words = {
      "False", "None", "True", "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else",
      "except", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "nonlocal", "not", "or", "pass", "raise",
      "return", "try", "while", "with", "yield"};
  return words.count(name) > 0;
}

/// Turns an expression into steps on a stack: operands first, then what is done with them.
class Reader {
 public:
  explicit Reader(const std::string& text) : text_(text) {}

  std::vector<Step> read() {
    if (text_.size() > kLongestBytes) fail();
    sum();
    next();
    if (at_ < text_.size()) fail();
    return std::move(steps_);
  }

 private:
  void sum() {
    product();
    while (true) {
      if (take("+")) product(), add(Op::Add);
      else if (take("-")) product(), add(Op::Subtract);
      else return;
    }
  }

  void product() {
    factor();
    while (true) {
      if (take("*")) factor(), add(Op::Multiply);
      else if (take("//")) factor(), add(Op::Divide);
      else if (take("%")) factor(), add(Op::Modulo);
      else return;
    }
  }

  void factor() {
    if (take("-")) factor(), add(Op::Negate);
    else if (take("(")) sum(), need(")");
    else if (is_digit(next())) number();
    else if (starts_name(next())) name();
    else fail();
  }

  void number() {
    std::int64_t value = 0;
    const char *first = text_.data() + at_, *end = text_.data() + text_.size();
    const auto [last, error] = std::from_chars(first, end, value);
    if (error != std::errc() || (*first == '0' && last - first > 1)) fail();  // 007 is no number to Python
    at_ += static_cast<std::size_t>(last - first);
    steps_.push_back({Op::Number, value});
  }

  void name() {
    const std::size_t first = at_;
    while (at_ < text_.size() && (starts_name(text_[at_]) || is_digit(text_[at_]))) ++at_;
    const std::string found = text_.substr(first, at_ - first);
    if (is_reserved(found)) fail();
    if (take("(")) call(found);
    else steps_.push_back({Op::Name, 0, found});
  }

  void call(const std::string& function) {
    if (function != "min" && function != "max") fail();
    sum();
    need(",");
    do sum(), add(function == "min" ? Op::Min : Op::Max);
    while (take(","));
    need(")");
  }

  /// The character that comes after spaces; none at the end.
  char next() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(const std::string& token) {
    next();
    if (text_.compare(at_, token.size(), token) != 0) return false;
    at_ += token.size();
    return true;
  }
  void need(const std::string& token) {
    if (!take(token)) fail();
  }
  void add(Op op) { steps_.push_back({op}); }
  [[noreturn]] void fail() const {
    throw InputError(text::quoted(text_) + " is no size: give a number, a dimension, or an expression of them with + - * // %, min, max and " +
                     "parentheses, of at most " + std::to_string(kLongestBytes) + " bytes");
  }

  const std::string& text_;
  std::size_t at_ = 0;
  std::vector<Step> steps_;
};

/// Rounded down, as in Python: C++ rounds towards 0. None where int64 does not hold it.
std::optional<std::int64_t> divided(std::int64_t a, std::int64_t b) {
  if (a == INT64_MIN && b == -1) return std::nullopt;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

std::int64_t modulo(std::int64_t a, std::int64_t b) {
  if (b == -1) return 0;  // the quotient of the smallest number is none, and C++ leaves what happens open
  const std::int64_t rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

/// None where int64 does not hold it.
std::optional<std::int64_t> combined(Op op, std::int64_t a, std::int64_t b) {
  std::int64_t value = 0;
  switch (op) {
    case Op::Add: return __builtin_add_overflow(a, b, &value) ? std::nullopt : std::optional(value);
    case Op::Subtract: return __builtin_sub_overflow(a, b, &value) ? std::nullopt : std::optional(value);
    case Op::Multiply: return __builtin_mul_overflow(a, b, &value) ? std::nullopt : std::optional(value);
    case Op::Divide: return divided(a, b);
    case Op::Modulo: return modulo(a, b);
    case Op::Min: return std::min(a, b);
    default: return std::max(a, b);
  }
}

std::int64_t taken(std::vector<std::int64_t>& stack) {
  const std::int64_t value = stack.back();
  stack.pop_back();
  return value;
}

std::int64_t result_of(const Step& step, std::vector<std::int64_t>& stack, const std::map<std::string, std::int64_t>& sizes) {
  if (step.op == Op::Number) return step.number;
  if (step.op == Op::Name) return sizes.at(step.name);
  const std::int64_t right = taken(stack), left = step.op == Op::Negate ? 0 : taken(stack);
  if (right == 0 && (step.op == Op::Divide || step.op == Op::Modulo)) throw NoValue{"divides by 0"};
  const auto value = combined(step.op == Op::Negate ? Op::Subtract : step.op, left, right);
  if (!value) throw NoValue{"is more than 64 bits hold"};
  return *value;
}

std::string where(const std::string& expression, const std::map<std::string, std::int64_t>& sizes) {
  std::vector<std::string> parts;
  for (const std::string& name : names_in(expression)) parts.push_back(name + " " + std::to_string(sizes.at(name)));
  return parts.empty() ? "any sizes" : text::join(parts);
}

}  // namespace

std::set<std::string> names_in(const std::string& expression) {
  std::set<std::string> names;
  for (const Step& step : Reader(expression).read()) {
    if (step.op == Op::Name) names.insert(step.name);
  }
  return names;
}

std::int64_t value_of(const std::string& expression, const std::map<std::string, std::int64_t>& sizes) {
  try {
    std::vector<std::int64_t> stack;
    for (const Step& step : Reader(expression).read()) stack.push_back(result_of(step, stack, sizes));
    if (stack.back() < 0) throw NoValue{"is " + std::to_string(stack.back()) + ", below 0,"};
    return stack.back();
  } catch (const NoValue& none) {
    throw InputError(text::quoted(expression) + " " + none.what + " at " + where(expression, sizes) + "; give other sizes");
  }
}

}  // namespace bca::arithmetic
