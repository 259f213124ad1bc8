// Sizes that follow from others, such as "height * width"; the rules of the Python package's arithmetic.py.
// tests/arithmetic_cases.json is the table of expressions that both are held to.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

namespace bca::arithmetic {

/// The names that an expression needs. Throws InputError where it is none.
std::set<std::string> names_in(const std::string& expression);

/// What an expression is at these sizes, which must have every name. Throws InputError where it is none, divides by 0, is below
/// 0, or more than int64 holds on the way.
std::int64_t value_of(const std::string& expression, const std::map<std::string, std::int64_t>& sizes);

}  // namespace bca::arithmetic
