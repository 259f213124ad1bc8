// Which of an engine's optimization profiles runs a request.
#pragma once

#include <vector>

#include "contract.hpp"

namespace bca {

/// The smallest, the optimal and the largest shape of one input.
struct ShapeRange {
  Shape min, opt, max;
};

/// The ranges of every input, in the engine's order.
using Profile = std::vector<ShapeRange>;

/// Returns the number of the profile that holds the shapes and whose optimal ones are nearest to them: the smallest sum of
/// |log(size / opt)|, so that half as long is as far off as twice as long. Throws InputError where none holds them.
std::size_t choose_profile(const std::vector<Profile>& profiles, const std::vector<TensorInfo>& inputs, const std::vector<Shape>& shapes);

}  // namespace bca
