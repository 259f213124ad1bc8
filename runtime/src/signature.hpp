// What a model takes and gives; the rules of the Python package's signature.py.
#pragma once

#include "bca/session.hpp"

namespace bca {

/// Of each named dimension.
using Sizes = std::map<std::string, std::int64_t>;

/// What is wrong with it: two tensors of one name, a dimension that no input which must be given has, an axis of an output that
/// is no size, a mask that is none. Empty where it is right.
std::string fault_of(const Signature& signature);

/// The same with this element type in place of float32.
Signature of_floats(Signature signature, DType dtype);

/// The smallest and largest size of each dimension over all profiles, at least one; optimal ones are the first's.
Dims hull(const std::vector<Dims>& profiles);

/// Whether every size is in its range.
bool holds(const Dims& profile, const Sizes& sizes);
bool holds(const DimRange& range, std::int64_t size);

/// The sizes by name of a shape that has one for each dimension, in order. Throws InputError for one too many or too few.
Sizes named(const Dims& dims, const Shape& shape);

/// The shape that axes have at these sizes. Throws InputError where an output's expression has no value there.
Shape shape_at(const std::vector<Axis>& axes, const Sizes& sizes);

}  // namespace bca
