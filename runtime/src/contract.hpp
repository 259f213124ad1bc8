// What a model takes, checked before the call, in the words of the Python package's session/contract.py.
// tests/contract_cases.json is the table of refusals that both are held to.
#pragma once

#include <string>
#include <vector>

#include "bca/session.hpp"

namespace bca {

/// The named dimensions of one request.
struct Sizes {
  std::int64_t batch = 0, x_len = 0, context_len = 0;
};

/// A request as the model takes it: views in the model's order; `owned` keeps what was made for it.
struct Ready {
  std::vector<View> views;
  std::vector<Tensor> owned;
  Sizes sizes;
};

class Contract {
 public:
  /// `profiles`: the combinations of sizes, where not every one within `dims` will do.
  Contract(std::vector<TensorInfo> inputs, Dims dims, std::vector<Dims> profiles = {});

  /// Throws InputError, naming the input, the axis, what it got, what is allowed and the way out.
  Ready check(const Inputs& given, bool cast) const;

  /// The same for a request of these sizes that is yet to be made.
  void check(const Sizes& sizes) const;

 private:
  struct Known;
  const View* find(const Inputs& given, const std::string& name) const;
  void check_names(const Inputs& given) const;
  Sizes sizes_of(const Inputs& given) const;
  void check_profiles(const Sizes& sizes) const;
  void check_shape(const TensorInfo& input, const Shape& shape, Known& known) const;
  void check_size(const TensorInfo& input, std::size_t index, std::int64_t size, Known& known) const;
  const DimRange& range_of(const std::string& axis) const;
  std::string way_out(const std::string& axis, std::int64_t size, const DimRange& allowed) const;
  bool has(const std::string& name) const;

  std::vector<TensorInfo> inputs_;
  std::vector<std::string> names_;
  Dims dims_;
  std::vector<Dims> profiles_;
};

/// The shape that named axes have at these sizes.
Shape shape_at(const std::vector<Axis>& axes, const Sizes& sizes);

}  // namespace bca
