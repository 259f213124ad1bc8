// What a session runs on: takes checked requests, from any number of threads at once.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "bca/session.hpp"

namespace bca {

/// What is fixed when a runner is made.
struct RunnerInfo {
  Backend backend = Backend::Auto;
  Precision precision = Precision::Fp32;
  std::string what;                        // the file that runs and what runs it
  Signature signature;
  std::vector<Dims> profiles;              // the combinations of sizes, where not every one within the signature's will do
};

class Runner {
 public:
  explicit Runner(RunnerInfo info) : info(std::move(info)) {}
  virtual ~Runner() = default;

  /// Whether views of GPU memory and streams are taken.
  virtual bool on_gpu() const = 0;

  /// Views in the order of the signature's inputs and outputs, all checked. Throws EngineError.
  virtual void run(const std::vector<View>& inputs, const std::vector<MutableView>& outputs, void* stream) = 0;

  const RunnerInfo info;
};

}  // namespace bca
