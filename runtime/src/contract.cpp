#include "contract.hpp"

#include <algorithm>
#include <cstring>

#include "cast.hpp"
#include "text.hpp"

namespace bca {
namespace {

void check_pointer(const std::string& name, const View& view) {
  if (!view.data) throw InputError("input " + name + " has no memory: its pointer is null; leave a mask out instead");
}

/// A bool that is neither 0 nor 1 is undefined in C++ and in the kernels. On the GPU nobody looks: it would have to be waited for.
void check_bools(const std::string& name, const View& view) {
  if (view.dtype != DType::Bool || view.memory != Memory::Cpu) return;
  const auto* bytes = static_cast<const std::uint8_t*>(view.data);
  const std::size_t count = count_of(view.shape);
  const auto* bad = std::find_if(bytes, bytes + count, [](std::uint8_t byte) { return byte > 1; });
  if (bad == bytes + count) return;
  throw InputError("input " + name + ": a bool is one byte of 0 or 1, and here is one of " + std::to_string(*bad) + "; write 1 where it is true");
}

/// A view of one number along some axes, over the whole shape.
Tensor spread(const TensorInfo& input, const View& view, const Shape& shape) {
  if (view.memory != Memory::Cpu) {
    throw InputError("input " + input.name + " is " + text::shown(view.shape) + " on the GPU, and needs " + text::shown(shape) + "; expand it there");
  }
  Tensor made(view.dtype, shape);
  const std::size_t each = size_of(view.dtype);
  for (std::size_t i = 0; i < made.count(); ++i) {
    std::size_t rest = i, from = 0, stride = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      const auto size = static_cast<std::size_t>(shape[axis]), own = static_cast<std::size_t>(view.shape[axis]);
      from += own == 1 ? 0 : rest % size * stride;
      rest /= size;
      stride *= own;
    }
    std::memcpy(static_cast<char*>(made.data()) + i * each, static_cast<const char*>(view.data) + from * each, each);
  }
  return made;
}

}  // namespace

/// The sizes seen so far, and which input each came from.
struct Contract::Known {
  Sizes sizes;
  std::map<std::string, std::string> from;
};

Contract::Contract(Signature signature, std::vector<Dims> profiles, std::map<std::string, std::string> left_out)
    : signature_(std::move(signature)), profiles_(std::move(profiles)), left_out_(std::move(left_out)) {
  for (const TensorInfo& input : signature_.inputs) names_.push_back(input.name);
  masks_last_ = signature_.inputs;
  std::stable_partition(masks_last_.begin(), masks_last_.end(), [&](const TensorInfo& input) { return !is_mask(input.name); });
}

bool Contract::is_mask(const std::string& name) const {
  return std::any_of(signature_.masks.begin(), signature_.masks.end(), [&](const auto& entry) { return entry.second == name; });
}

Ready Contract::check(const Inputs& given, bool cast) const {
  check_names(given);
  Ready ready;
  const auto& inputs = signature_.inputs;
  ready.views.resize(inputs.size());
  ready.owned.reserve(2 * inputs.size());  // views point into it: what was cast, and then spread
  ready.sizes = sizes_of(given);  // of all, before anything is made of any
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const TensorInfo& input = inputs[i];
    const View* view = find(given, input.name);
    if (view) check_pointer(input.name, *view);  // after the sizes: what is empty may be null, and is refused for its size
    if (!view) ready.views[i] = ready.owned.emplace_back(filled(input.dtype, shape_at(input.axes, ready.sizes), *input.fill));
    else if (view->dtype == input.dtype) ready.views[i] = *view;
    else ready.views[i] = ready.owned.emplace_back(cast_to(input, *view, cast, is_mask(input.name)));
    if (view) check_bools(input.name, ready.views[i]);
    if (!view || !is_mask(input.name)) continue;
    const Shape shape = shape_at(input.axes, ready.sizes);
    if (view->shape != shape) ready.views[i] = ready.owned.emplace_back(spread(input, ready.views[i], shape));
  }
  return ready;
}

void Contract::check(const Sizes& sizes) const {
  Known known;
  for (const TensorInfo& input : signature_.inputs) check_shape(input, shape_at(input.axes, sizes), known);
  check_profiles(sizes);
}

/// Checked against everything that is known of them.
Sizes Contract::sizes_of(const Inputs& given) const {
  Known known;
  for (const TensorInfo& input : masks_last_) {
    const View* view = find(given, input.name);
    if (view) check_shape(input, view->shape, known);
    else if (!input.fill) throw InputError("input " + input.name + " is missing; the model takes " + text::join(names_));
  }
  check_profiles(known.sizes);
  return known.sizes;
}

void Contract::check_profiles(const Sizes& sizes) const {
  const auto fits = [&](const Dims& profile) { return holds(profile, sizes); };
  if (profiles_.empty() || std::any_of(profiles_.begin(), profiles_.end(), fits)) return;
  std::vector<std::string> allowed;
  for (const Dims& profile : profiles_) allowed.push_back(text::shown(profile));
  std::vector<std::string> got;
  for (const auto& dim : signature_.dims) got.push_back(dim.first + " " + std::to_string(sizes.at(dim.first)));
  const std::size_t lengths = signature_.dims.size() - (signature_.batch.empty() ? 0 : 1);
  throw InputError("no optimization profile of the engine holds " + text::join(got) + "; it has " + text::join(allowed, "; or ") +
                   // Padding that no mask tells of would be attended to.
                   (signature_.masks.size() == lengths ? "; pad and mask the padding, " : "; ") +
                   (signature_.batch.empty() ? "" : "split the batch, or ") + "build the engine with a profile for it");
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
      const auto left_out = left_out_.find(name);
      const std::string how = left_out == left_out_.end() ? "" : "; this export left it out: bca-export " + left_out->second;
      throw InputError("the model has no input " + text::quoted(name) + text::nearest(name, names_) + "; it takes " + text::join(names_) + how);
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
    if (found->second == size || (size == 1 && is_mask(input.name))) return;
    throw InputError(where + " (" + axis + ")" + is + ", but " + known.from[axis] + " has " + std::to_string(found->second) + "; they must agree");
  }
  const DimRange& allowed = signature_.dims.at(axis);
  if (!holds(allowed, size)) {
    throw InputError(where + " (" + axis + ")" + is + ", allowed " + std::to_string(allowed.min) + " to " + std::to_string(allowed.max) +
                     "; " + way_out(axis, size, allowed));
  }
  known.sizes[axis] = size;
  known.from[axis] = input.name;
}

/// What to do, and the answers are the same: the entries of a batch are apart, the rows of a sequence are not.
std::string Contract::way_out(const std::string& axis, std::int64_t size, const DimRange& allowed) const {
  const bool batch = axis == signature_.batch;
  const std::string again = profiles_.empty() ? "export again with wider dims" : "build the engine with a profile for it";
  if (size < 1) return batch ? "an empty batch has nothing to run" : "nothing attends to an empty sequence; leave its entry out";
  if (size > allowed.max) {
    return batch ? "split the batch, or " + again : "a sequence cannot be cut, as each row attends to all of the other side; " + again;
  }
  if (batch) return "add entries and drop their outputs, or " + again;
  return signature_.masks.count(axis) ? "pad it and mask the padding, or " + again : again;
}

bool Contract::has(const std::string& name) const { return std::find(names_.begin(), names_.end(), name) != names_.end(); }

}  // namespace bca
