// The bundle's self-test: selftest.npz holds inputs, float64 outputs and bounds, named <precision>/<case>/<kind>/<tensor>.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "bca/session.hpp"

namespace bca::selftest {

using Arrays = std::map<std::string, Tensor>;

/// Throws BundleError where the file is damaged.
Arrays read(const std::filesystem::path& file);

/// Runs one model over the self-test; one sentence for each output out of bounds, none where all is well.
/// Throws BundleError where the arrays are no self-test of the model: a bound or an output is missing, an input does not fit.
std::vector<std::string> failures(const Arrays& arrays, const std::string& precision, const std::function<Outputs(const Inputs&)>& run);

}  // namespace bca::selftest
