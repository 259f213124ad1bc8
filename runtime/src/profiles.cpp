#include "profiles.hpp"

#include <cmath>
#include <limits>

#include "text.hpp"

namespace bca {
namespace {

bool holds(const Profile& profile, const std::vector<Shape>& shapes) {
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto& [min, opt, max] = profile[i];
    if (shapes[i].size() != min.size()) return false;
    for (std::size_t axis = 0; axis < min.size(); ++axis) {
      if (shapes[i][axis] < min[axis] || shapes[i][axis] > max[axis]) return false;
    }
  }
  return true;
}

double distance(const Profile& profile, const std::vector<Shape>& shapes) {
  double sum = 0;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    for (std::size_t axis = 0; axis < shapes[i].size(); ++axis) {
      sum += std::abs(std::log(static_cast<double>(shapes[i][axis]) / static_cast<double>(profile[i].opt[axis])));
    }
  }
  return sum;
}

std::string in_words(const Profile& profile, const std::vector<TensorInfo>& inputs) {
  std::vector<std::string> parts;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    parts.push_back(inputs[i].name + " " + text::shown(profile[i].min) + " to " + text::shown(profile[i].max));
  }
  return text::join(parts);
}

[[noreturn]] void refuse(const std::vector<Profile>& profiles, const std::vector<TensorInfo>& inputs, const std::vector<Shape>& shapes) {
  std::vector<std::string> sizes, allowed;
  for (std::size_t i = 0; i < shapes.size(); ++i) sizes.push_back(inputs[i].name + " " + text::shown(shapes[i]));
  for (const Profile& profile : profiles) allowed.push_back(in_words(profile, inputs));
  throw InputError("no profile of the engine holds " + text::join(sizes) + "; it has: " + text::join(allowed, "; "));
}

}  // namespace

std::size_t choose_profile(const std::vector<Profile>& profiles, const std::vector<TensorInfo>& inputs, const std::vector<Shape>& shapes) {
  std::size_t best = profiles.size();
  double nearest = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    if (!holds(profiles[i], shapes)) continue;
    const double found = distance(profiles[i], shapes);
    if (found < nearest) best = i, nearest = found;
  }
  if (best == profiles.size()) refuse(profiles, inputs, shapes);
  return best;
}

}  // namespace bca
