#include "selftest.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "cast.hpp"
#include "text.hpp"

namespace bca::selftest {
namespace {

/// The arrays below one place and of one kind, by tensor.
std::vector<std::pair<std::string, const Tensor*>> below(const Arrays& arrays, const std::string& prefix) {
  std::vector<std::pair<std::string, const Tensor*>> found;
  for (auto at = arrays.lower_bound(prefix); at != arrays.end() && at->first.compare(0, prefix.size(), prefix) == 0; ++at) {
    found.emplace_back(at->first.substr(prefix.size()), &at->second);
  }
  return found;
}

std::set<std::string> places(const Arrays& arrays, const std::string& precision) {
  std::set<std::string> found;
  for (const auto& [name, array] : below(arrays, precision + "/")) found.insert(precision + "/" + name.substr(0, name.find('/')));
  return found;
}

/// Infinity where anything is NaN or the sizes differ, so that no bound holds.
double worst_error(const Tensor& got, const Tensor& truth) {
  const std::vector<double> values = as_doubles(got), wanted = as_doubles(truth);
  if (values.size() != wanted.size()) return INFINITY;
  double worst = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double error = std::abs(values[i] - wanted[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

double bound_of(const Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  if (found == arrays.end() || found->second.count() != 1) throw BundleError("selftest.npz has no bound " + name + "; export the bundle again");
  return as_doubles(found->second).front();
}

void judge(const Arrays& arrays, const std::string& place, const Outputs& outputs, std::vector<std::string>& failures) {
  for (const auto& [name, truth] : below(arrays, place + "/output/")) {
    const auto got = outputs.find(name);
    const double worst = got == outputs.end() ? INFINITY : worst_error(got->second, *truth);
    const double bound = bound_of(arrays, place + "/bound/" + name);
    if (worst <= bound) continue;
    failures.push_back("self-test " + place + ": " + name + " is off by " + text::number(worst) + ", allowed " + text::number(bound));
  }
}

}  // namespace

std::vector<std::string> failures(const Arrays& arrays, const std::string& precision, const std::function<Outputs(const Inputs&)>& run) {
  const std::set<std::string> found = places(arrays, precision);
  if (found.empty()) return {"self-test: no case of precision " + precision + ", so nothing is proven"};
  std::vector<std::string> failures;
  for (const std::string& place : found) {
    Inputs inputs;
    for (const auto& [name, array] : below(arrays, place + "/input/")) inputs.emplace_back(name, *array);
    judge(arrays, place, run(inputs), failures);
  }
  return failures;
}

}  // namespace bca::selftest
