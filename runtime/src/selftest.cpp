#include "selftest.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "cast.hpp"
#include "npy.hpp"
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

[[noreturn]] void refuse(const std::string& why) { throw BundleError("selftest.npz: " + why + "; export the bundle again"); }

/// Infinity where anything is NaN or the shapes differ, so that no bound holds. What is infinite must be the same infinity.
double worst_error(const Tensor& got, const Tensor& truth) {
  if (got.shape() != truth.shape()) return INFINITY;
  const std::vector<double> values = as_doubles(got), wanted = as_doubles(truth);
  double worst = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double error = values[i] == wanted[i] ? 0 : std::abs(values[i] - wanted[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst;
}

double bound_of(const Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  if (found == arrays.end() || found->second.count() != 1) refuse(name + " is not one number");
  return as_doubles(found->second).front();
}

void judge(const Arrays& arrays, const std::string& place, const Outputs& outputs, std::vector<std::string>& failures) {
  const auto truths = below(arrays, place + "/output/");
  if (truths.empty()) refuse(place + " has no outputs, so nothing is proven");
  for (const auto& [name, truth] : truths) {
    const auto got = outputs.find(name);
    const double worst = got == outputs.end() ? INFINITY : worst_error(got->second, *truth);
    const double bound = bound_of(arrays, place + "/bound/" + name);
    if (worst <= bound) continue;
    failures.push_back("self-test " + place + ": " + name + " is off by " + text::number(worst) + ", allowed " + text::number(bound));
  }
}

Outputs outputs_of(const Arrays& arrays, const std::string& place, const std::function<Outputs(const Inputs&)>& run) {
  Inputs inputs;
  for (const auto& [name, array] : below(arrays, place + "/input/")) inputs.emplace_back(name, *array);
  try {
    return run(inputs);
  } catch (const InputError& error) {  // they are the bundle's, not the caller's
    refuse(place + ": " + error.what());
  }
}

}  // namespace

Arrays read(const std::filesystem::path& file) {
  try {
    return npy::read_npz(file);
  } catch (const InputError& error) {
    throw BundleError(std::string(error.what()) + "; copy or export the bundle again");
  }
}

std::vector<std::string> failures(const Arrays& arrays, const std::string& precision, const std::function<Outputs(const Inputs&)>& run) {
  const std::set<std::string> found = places(arrays, precision);
  if (found.empty()) return {"self-test: no case of precision " + precision + ", so nothing is proven"};
  std::vector<std::string> failures;
  for (const std::string& place : found) judge(arrays, place, outputs_of(arrays, place, run), failures);
  return failures;
}

}  // namespace bca::selftest
