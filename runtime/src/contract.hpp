// What a model takes, checked before the call, in the words of the Python package's session/contract.py.
// tests/contract_cases.json is the table of refusals that both are held to.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "signature.hpp"

namespace bca {

/// A request as the model takes it: views in the model's order; `owned` keeps what was made for it.
struct Ready {
  std::vector<View> views;
  std::vector<Tensor> owned;
  Sizes sizes;
};

class Contract {
 public:
  /// `profiles`: the combinations of sizes, where not every one within the signature's ranges will do.
  /// `left_out`: what the export left out, by name, each with the option that decides about it.
  explicit Contract(Signature signature, std::vector<Dims> profiles = {}, std::map<std::string, std::string> left_out = {});

  /// Throws InputError, naming the input, the axis, what it got, what is allowed and the way out.
  /// A mask is spread as the layer does it: [1, N] over the batch, [B, 1] over the length.
  Ready check(const Inputs& given, bool cast) const;

  /// The same for a request of these sizes that is yet to be made.
  void check(const Sizes& sizes) const;

 private:
  struct Known;
  bool is_mask(const std::string& name) const;
  const View* find(const Inputs& given, const std::string& name) const;
  void check_names(const Inputs& given) const;
  Sizes sizes_of(const Inputs& given) const;
  void check_profiles(const Sizes& sizes) const;
  void check_shape(const TensorInfo& input, const Shape& shape, Known& known) const;
  void check_size(const TensorInfo& input, std::size_t index, std::int64_t size, Known& known) const;
  std::string way_out(const std::string& axis, std::int64_t size, const DimRange& allowed) const;
  bool has(const std::string& name) const;

  Signature signature_;
  std::vector<std::string> names_;
  std::vector<TensorInfo> masks_last_;          // one of one entry or one length is spread over the sizes that the others have
  std::vector<Dims> profiles_;
  std::map<std::string, std::string> left_out_;
};

}  // namespace bca
