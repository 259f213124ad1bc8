#include "text.hpp"

#include <algorithm>
#include <cstdio>

namespace bca::text {
namespace {

/// Characters in matching blocks: the longest common block, then the same left and right of it (Ratcliff and Obershelp),
/// the earliest in both where several are longest. difflib does the same.
std::size_t matching(const std::string& a, const std::string& b) {
  std::size_t best = 0, at_a = 0, at_b = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size(); ++j) {
      std::size_t length = 0;
      while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) ++length;
      if (length > best) best = length, at_a = i, at_b = j;
    }
  }
  if (best == 0) return 0;
  return best + matching(a.substr(0, at_a), b.substr(0, at_b)) + matching(a.substr(at_a + best), b.substr(at_b + best));
}

double ratio(const std::string& a, const std::string& b) {
  return a.empty() && b.empty() ? 1.0 : 2.0 * static_cast<double>(matching(a, b)) / static_cast<double>(a.size() + b.size());
}

/// A character of a Python string between such quotes.
std::string escaped(char c, char quote) {
  const auto byte = static_cast<unsigned char>(c);
  if (c == quote || c == '\\') return {'\\', c};
  if (c == '\n') return "\\n";
  if (c == '\r') return "\\r";
  if (c == '\t') return "\\t";
  if (byte >= 32 && byte != 127) return {c};
  char buffer[8];
  std::snprintf(buffer, sizeof buffer, "\\x%02x", byte);
  return buffer;
}

}  // namespace

std::string join(const std::vector<std::string>& parts, const char* between) {
  std::string joined;
  for (const std::string& part : parts) joined += (joined.empty() ? "" : between) + part;
  return joined;
}

std::string nearest(const std::string& name, const std::vector<std::string>& known) {
  const std::string* best = nullptr;
  double best_ratio = 0.5;
  if (name.size() > 200) return "";  // no typing mistake, and the comparison takes its length squared
  for (const std::string& candidate : known) {
    const double found = ratio(candidate, name);
    if (found > best_ratio || (found == best_ratio && (best == nullptr || candidate > *best))) {
      best = &candidate, best_ratio = found;
    }
  }
  return best ? " (did you mean '" + *best + "'?)" : "";
}

std::string joined(const Shape& shape, const char* between) {
  std::vector<std::string> sizes;
  for (std::int64_t size : shape) sizes.push_back(std::to_string(size));
  return join(sizes, between);
}

std::string shown(const Shape& shape) { return "[" + joined(shape, ", ") + "]"; }

std::string shown(const std::vector<Axis>& axes) {
  std::vector<std::string> parts;
  for (const Axis& axis : axes) {
    const auto* name = std::get_if<std::string>(&axis);
    parts.push_back(name ? *name : std::to_string(std::get<std::int64_t>(axis)));
  }
  return "[" + join(parts) + "]";
}

std::string shown(const Dims& dims) {
  std::vector<std::string> parts;
  for (const auto& [name, range] : dims) parts.push_back(name + " " + std::to_string(range.min) + " to " + std::to_string(range.max));
  return join(parts);
}

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3g", value);
  return buffer;
}

std::string whole(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.0f", value);
  return buffer;
}

std::string quoted(const std::string& text) {
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string shown(1, quote);
  for (const char c : text) shown += escaped(c, quote);
  return shown + quote;
}

}  // namespace bca::text
