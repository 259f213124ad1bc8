#include "contract.hpp"

#include <algorithm>
#include <cstring>
#include <map>

#include "cast.hpp"
#include "text.hpp"

namespace bca {
namespace {

void check_pointer(const std::string& name, const View& view) {
  if (!view.data) throw InputError("input " + name + " has no memory: its pointer is null; leave a mask out instead");
}

bool is_optional(const TensorInfo& input) { return input.name == "mask" || input.name == "context_mask"; }

/// A bool that is neither 0 nor 1 is undefined in C++ and in the kernels. On the GPU nobody looks: it would have to be waited for.
void check_bools(const std::string& name, const View& view) {
  if (view.dtype != DType::Bool || view.memory != Memory::Cpu) return;
  const auto* bytes = static_cast<const std::uint8_t*>(view.data);
  const std::size_t count = count_of(view.shape);
  const auto* bad = std::find_if(bytes, bytes + count, [](std::uint8_t byte) { return byte > 1; });
  if (bad == bytes + count) return;
  throw InputError("input " + name + ": a bool is one byte of 0 or 1, and here is one of " + std::to_string(*bad) + "; write 1 where it is true");
}

Tensor all_true(Shape shape) {
  Tensor made(DType::Bool, std::move(shape));
  std::memset(made.data(), 1, made.bytes());
  return made;
}

bool is_in(std::int64_t size, const DimRange& range) { return range.min <= size && size <= range.max; }

bool holds(const Dims& profile, const Sizes& sizes) {
  return is_in(sizes.batch, profile.batch) && is_in(sizes.x_len, profile.x_len) && is_in(sizes.context_len, profile.context_len);
}

std::int64_t size_of_axis(const std::string& axis, const Sizes& sizes) {
  return axis == "batch" ? sizes.batch : axis == "x_len" ? sizes.x_len : sizes.context_len;
}

}  // namespace

/// The sizes seen so far, and which input each came from.
struct Contract::Known {
  std::map<std::string, std::pair<std::int64_t, std::string>> sizes;

  std::int64_t at(const std::string& axis) const {
    const auto found = sizes.find(axis);
    return found == sizes.end() ? 0 : found->second.first;
  }
};

Contract::Contract(std::vector<TensorInfo> inputs, Dims dims, std::vector<Dims> profiles)
    : inputs_(std::move(inputs)), dims_(dims), profiles_(std::move(profiles)) {
  for (const TensorInfo& input : inputs_) names_.push_back(input.name);
}

Ready Contract::check(const Inputs& given, bool cast) const {
  check_names(given);
  Ready ready;
  ready.views.resize(inputs_.size());
  ready.owned.reserve(inputs_.size());
  ready.sizes = sizes_of(given);  // of all, before anything is made of any
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    const TensorInfo& input = inputs_[i];
    const View* view = find(given, input.name);
    if (view) check_pointer(input.name, *view);  // after the sizes: what is empty may be null, and is refused for its size
    if (!view) ready.views[i] = ready.owned.emplace_back(all_true(shape_at(input.axes, ready.sizes)));
    else if (view->dtype == input.dtype) ready.views[i] = *view;
    else ready.views[i] = ready.owned.emplace_back(cast_to(input, *view, cast));
    if (view) check_bools(input.name, ready.views[i]);
  }
  return ready;
}

void Contract::check(const Sizes& sizes) const {
  Known known;
  for (const TensorInfo& input : inputs_) check_shape(input, shape_at(input.axes, sizes), known);
  check_profiles(sizes);
}

/// Checked against everything that is known of them.
Sizes Contract::sizes_of(const Inputs& given) const {
  Known known;
  for (const TensorInfo& input : inputs_) {
    const View* view = find(given, input.name);
    if (view) check_shape(input, view->shape, known);
    else if (!is_optional(input)) throw InputError("input " + input.name + " is missing; the model takes " + text::join(names_));
  }
  const Sizes sizes = {known.at("batch"), known.at("x_len"), known.at("context_len")};
  check_profiles(sizes);
  return sizes;
}

void Contract::check_profiles(const Sizes& sizes) const {
  const auto fits = [&](const Dims& profile) { return holds(profile, sizes); };
  if (profiles_.empty() || std::any_of(profiles_.begin(), profiles_.end(), fits)) return;
  std::vector<std::string> allowed;
  for (const Dims& profile : profiles_) allowed.push_back(text::shown(profile));
  throw InputError("no optimization profile of the engine holds batch " + std::to_string(sizes.batch) + ", x_len " + std::to_string(sizes.x_len) +
                   ", context_len " + std::to_string(sizes.context_len) + "; it has " + text::join(allowed, "; or ") +
                   // Padding that no mask tells of would be attended to.
                   (has("mask") && has("context_mask") ? "; pad and mask the padding, " : "; ") +
                   "split the batch, or build the engine with a profile for it");
}

const View* Contract::find(const Inputs& given, const std::string& name) const {
  for (const auto& [key, view] : given) {
    if (key == name) return &view;
  }
  return nullptr;
}

void Contract::check_names(const Inputs& given) const {
  for (const auto& [name, view] : given) {
    if (!has(name)) {
      throw InputError("the model has no input " + text::quoted(name) + text::nearest(name, names_) + "; it takes " + text::join(names_));
    }
    if (find(given, name) != &view) throw InputError("input " + name + " is given twice");
  }
}

void Contract::check_shape(const TensorInfo& input, const Shape& shape, Known& known) const {
  if (shape.size() != input.axes.size()) {
    throw InputError("input " + input.name + " has " + std::to_string(shape.size()) + " axes " + text::shown(shape) + ", and needs " +
                     std::to_string(input.axes.size()) + ": " + text::shown(input.axes));
  }
  for (std::size_t i = 0; i < shape.size(); ++i) check_size(input, i, shape[i], known);
}

void Contract::check_size(const TensorInfo& input, std::size_t index, std::int64_t size, Known& known) const {
  const std::string where = "input " + input.name + ": axis " + std::to_string(index), is = " is " + std::to_string(size);
  if (const auto* fixed = std::get_if<std::int64_t>(&input.axes[index])) {
    if (size == *fixed) return;
    throw InputError(where + is + ", and must be " + std::to_string(*fixed) + ": " + text::shown(input.axes));
  }
  const auto& axis = std::get<std::string>(input.axes[index]);
  const auto found = known.sizes.find(axis);
  if (found != known.sizes.end()) {
    if (found->second.first == size) return;
    throw InputError(where + " (" + axis + ")" + is + ", but " + found->second.second + " has " + std::to_string(found->second.first) +
                     "; they must agree");
  }
  const DimRange& allowed = range_of(axis);
  if (!is_in(size, allowed)) {
    throw InputError(where + " (" + axis + ")" + is + ", allowed " + std::to_string(allowed.min) + " to " + std::to_string(allowed.max) +
                     "; " + way_out(axis, size, allowed));
  }
  known.sizes[axis] = {size, input.name};
}

/// What to do, and the answers are the same: the entries of a batch are apart, the rows of a sequence are not.
std::string Contract::way_out(const std::string& axis, std::int64_t size, const DimRange& allowed) const {
  const bool batch = axis == "batch";
  const std::string again = profiles_.empty() ? "export again with wider dims" : "build the engine with a profile for it";
  if (size < 1) return batch ? "an empty batch has nothing to run" : "nothing attends to an empty sequence; leave its entry out";
  if (size > allowed.max) {
    return batch ? "split the batch, or " + again : "a sequence cannot be cut, as each row attends to all of the other side; " + again;
  }
  if (batch) return "add entries and drop their outputs, or " + again;
  return has(axis == "x_len" ? "mask" : "context_mask") ? "pad it and mask the padding, or " + again : again;
}

bool Contract::has(const std::string& name) const { return std::find(names_.begin(), names_.end(), name) != names_.end(); }

const DimRange& Contract::range_of(const std::string& axis) const {
  return axis == "batch" ? dims_.batch : axis == "x_len" ? dims_.x_len : dims_.context_len;
}

Shape shape_at(const std::vector<Axis>& axes, const Sizes& sizes) {
  Shape shape;
  for (const Axis& axis : axes) {
    const auto* name = std::get_if<std::string>(&axis);
    shape.push_back(name ? size_of_axis(*name, sizes) : std::get<std::int64_t>(axis));
  }
  return shape;
}

}  // namespace bca
