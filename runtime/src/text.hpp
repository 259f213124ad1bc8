// Texts of errors, as the Python package writes them.
#pragma once

#include <string>
#include <vector>

#include "bca/session.hpp"

namespace bca::text {

std::string join(const std::vector<std::string>& parts, const char* between = ", ");

/// " (did you mean 'x'?)" for the known name closest to `name`, or nothing: Python's difflib at a cutoff of 0.5.
std::string nearest(const std::string& name, const std::vector<std::string>& known);

std::string shown(const Shape& shape);                // [2, 5, 24]
std::string shown(const std::vector<Axis>& axes);     // [batch, x_len, 24]
std::string shown(const Dims& dims);                  // batch 1 to 4, x_len 1 to 16, context_len 1 to 16
std::string joined(const Shape& shape, const char* between);
std::string number(double value);                     // three significant digits, as "%.3g"
std::string whole(double value);                      // without decimals
std::string quoted(const std::string& text);          // as Python's repr does ASCII: in quotes, what does not print escaped

}  // namespace bca::text
