#include "signature.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "arithmetic.hpp"
#include "text.hpp"

namespace bca {
namespace {

void add_names(const std::vector<TensorInfo>& tensors, bool only_required, std::set<std::string>& names) {
  for (const TensorInfo& tensor : tensors) {
    if (only_required && tensor.fill) continue;
    for (const Axis& axis : tensor.axes) {
      if (const auto* name = std::get_if<std::string>(&axis)) names.insert(*name);
    }
  }
}

bool has(const Dims& dims, const std::string& name) {
  return std::any_of(dims.begin(), dims.end(), [&](const auto& dim) { return dim.first == name; });
}

/// Those that the axes of outputs depend on. Throws InputError for an axis that is neither a dimension nor an expression.
void add_output_names(const Signature& signature, std::set<std::string>& names) {
  for (const TensorInfo& tensor : signature.outputs) {
    for (const Axis& axis : tensor.axes) {
      const auto* text = std::get_if<std::string>(&axis);
      if (!text) continue;
      if (has(signature.dims, *text)) names.insert(*text);
      else names.merge(arithmetic::names_in(*text));
    }
  }
}

std::string name_used_twice(const Signature& signature) {
  std::set<std::string> seen;
  for (const auto* tensors : {&signature.inputs, &signature.outputs}) {
    for (const TensorInfo& tensor : *tensors) {
      if (!seen.insert(tensor.name).second) return tensor.name;
    }
  }
  return "";
}

constexpr std::size_t kLongestName = 255;  // bytes: errors hold it

/// A name that is too long, as errors show it; empty where there is none.
std::string too_long_name(const Signature& signature) {
  std::vector<std::string> names;
  for (const auto* tensors : {&signature.inputs, &signature.outputs}) {
    for (const TensorInfo& tensor : *tensors) names.push_back(tensor.name);
  }
  for (const auto& dim : signature.dims) names.push_back(dim.first);
  const auto found = std::find_if(names.begin(), names.end(), [](const std::string& name) { return name.size() > kLongestName; });
  return found == names.end() ? "" : found->substr(0, 40) + "... has " + std::to_string(found->size()) + " bytes";
}

bool can_mask(DType dtype) { return dtype == DType::Bool || dtype == DType::Int32 || dtype == DType::Int64; }

/// What is wrong with a mask of a dimension; empty where it is one.
std::string fault_of_mask(const Signature& signature, const std::string& name, const std::string& dim) {
  std::vector<std::string> over;
  if (!signature.batch.empty()) over.push_back(signature.batch);
  over.push_back(dim);
  const std::vector<Axis> axes(over.begin(), over.end());
  const auto found = [&](const TensorInfo& input) { return input.name == name && can_mask(input.dtype) && input.axes == axes; };
  if (dim != signature.batch && std::any_of(signature.inputs.begin(), signature.inputs.end(), found)) return "";
  std::transform(over.begin(), over.end(), over.begin(), text::quoted);
  return name + " cannot mask " + dim + "; a mask is a bool or integer input over [" + text::join(over) + "]";
}

}  // namespace

const DimRange& Dims::at(const std::string& name) const {
  for (const auto& [known, range] : *this) {
    if (known == name) return range;
  }
  throw std::out_of_range("there is no dimension " + name);
}

std::string fault_of(const Signature& signature) {
  if (const std::string twice = name_used_twice(signature); !twice.empty()) return twice + " is the name of two tensors; give each its own";
  if (const std::string name = too_long_name(signature); !name.empty()) return "the name " + name + "; at most " + std::to_string(kLongestName);
  std::set<std::string> known, used;
  add_names(signature.inputs, true, known);
  add_names(signature.inputs, false, used);
  try {
    add_output_names(signature, used);
  } catch (const InputError& error) {
    return error.what();
  }
  for (const auto& [name, range] : signature.dims) used.insert(name);
  if (!signature.batch.empty()) used.insert(signature.batch);
  for (const std::string& name : used) {
    if (!known.count(name) || !has(signature.dims, name)) {
      return "dimension " + name + " needs a range, and an input that has it and must be given";
    }
  }
  for (const auto& [dim, name] : signature.masks) {
    if (std::string fault = fault_of_mask(signature, name, dim); !fault.empty()) return fault;
  }
  return "";
}

Signature of_floats(Signature signature, DType dtype) {
  for (auto* tensors : {&signature.inputs, &signature.outputs}) {
    for (TensorInfo& tensor : *tensors) {
      if (tensor.dtype == DType::Float32) tensor.dtype = dtype;
    }
  }
  return signature;
}

Dims hull(const std::vector<Dims>& profiles) {
  Dims widest = profiles.front();
  for (const Dims& profile : profiles) {
    for (auto& [name, range] : widest) {
      range.min = std::min(range.min, profile.at(name).min);
      range.max = std::max(range.max, profile.at(name).max);
    }
  }
  return widest;
}

bool holds(const DimRange& range, std::int64_t size) { return range.min <= size && size <= range.max; }

bool holds(const Dims& profile, const Sizes& sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [&](const auto& size) { return holds(profile.at(size.first), size.second); });
}

Sizes named(const Dims& dims, const Shape& shape) {
  if (shape.size() != dims.size()) {
    std::vector<std::string> names;
    for (const auto& dim : dims) names.push_back(dim.first);
    throw InputError("shape " + text::joined(shape, "x") + ": give " + std::to_string(dims.size()) + " sizes, of " + text::join(names));
  }
  Sizes sizes;
  for (std::size_t i = 0; i < shape.size(); ++i) sizes[dims[i].first] = shape[i];
  return sizes;
}

Shape shape_at(const std::vector<Axis>& axes, const Sizes& sizes) {
  const auto size_of_axis = [&](const Axis& axis) {
    if (const auto* fixed = std::get_if<std::int64_t>(&axis)) return *fixed;
    const auto& text = std::get<std::string>(axis);
    const auto known = sizes.find(text);
    return known != sizes.end() ? known->second : arithmetic::value_of(text, sizes);
  };
  Shape shape;
  for (const Axis& axis : axes) shape.push_back(size_of_axis(axis));
  return shape;
}

}  // namespace bca
