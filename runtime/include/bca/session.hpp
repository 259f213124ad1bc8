// Open a bundle and run it, from any number of threads.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bca/errors.hpp"
#include "bca/tensor.hpp"

namespace bca {

/// What a session runs on. Auto takes the first of the others, in this order, that works here; a named one never falls back.
enum class Backend : int { Auto = 0, TensorRT, Rtx, OnnxRuntimeCuda, OnnxRuntimeCpu };

enum class Precision : int { Fp32 = 0, Fp16, Bf16 };

/// How much of the bundle is checked first: every hash, only sizes, or nothing but that the files are there.
enum class Verify : int { Full = 0, Size, Off };

/// What shows that the bundle is the function that its user runs: nothing, a sample of its outputs, or the live module.
enum class Trust : int { OnTrust = 0, Sample, LiveModule };

struct Options {
  Backend backend = Backend::Auto;
  std::optional<Precision> precision;    // none: the best that the backend has
  int threads = 0;                       // of ONNX Runtime on the CPU; 0: every core
  bool spinning = true;                  // its idle threads wait for the next call by spinning; false: they leave the cores to others
  Verify verify = Verify::Full;
  std::string onnxruntime_library;       // path; empty: $BCA_ORT_LIBRARY, then libonnxruntime.so.1
  std::string tensorrt_library;          // path; empty: the loader finds libnvinfer or libtensorrt_rtx
  std::string cuda_library;              // path; empty: the loader finds libcudart
  int device = 0;                        // the GPU
  int contexts = 2;                      // engine calls in flight at once; more wait for a free context
  bool host_code = false;                // let a version-compatible engine bring code that runs on the CPU; for engines that you trust only
};

struct RunOptions {
  bool cast = false;                     // take other floating-point types, and masks of 0 and 1
  void* stream = nullptr;                // a cudaStream_t, for the engine backends; see Session::run_into
};

/// An axis: a fixed size, the name of a dimension in Dims, or of an output what follows from them, such as "height * width".
using Axis = std::variant<std::int64_t, std::string>;

struct TensorInfo {
  std::string name;
  DType dtype = DType::Float32;
  std::vector<Axis> axes;
  std::optional<double> fill;            // of an input that may be left out: what it holds then; none: it must be given
};

/// The sizes that one named dimension may take.
struct DimRange {
  std::int64_t min = 1, opt = 1, max = 1;
};

/// The named dimensions and their ranges, in order.
struct Dims : std::vector<std::pair<std::string, DimRange>> {
  using vector::vector;
  /// Throws std::out_of_range.
  BCA_API const DimRange& at(const std::string& name) const;
};

/// What a model takes and gives.
struct Signature {
  std::vector<TensorInfo> inputs, outputs;
  Dims dims;
  std::string batch;                           // the dimension along which entries are apart; empty: there is none
  std::map<std::string, std::string> masks;    // for each dimension that may be padded, the bool or integer input that is 0 at padding
};

struct Explanation {
  std::string chosen;                                              // the backend, and the file that it runs
  std::vector<std::pair<std::string, std::string>> passed_over;    // faster backends, and why each was not taken
};

/// An open bundle on one backend.
///
/// Every const member may be called from any number of threads at once. Moving and destroying need the session for
/// themselves. The calling thread's floating-point mode is as before when a call returns.
class BCA_API Session {
 public:
  /// Opens and checks a bundle directory.
  /// Throws BundleError, InputError (options), EngineError (the backend asked for), MissingDependencyError. With Backend::Auto
  /// whatever keeps every backend from working is one EngineError, with each one's reason.
  static Session open(const std::filesystem::path& bundle, const Options& options = {});

  /// Runs the model and returns its outputs. For the layer: out [B, N, dim], context_out [B, M, context_dim], and attn and
  /// context_attn [B, heads, N, M] where the model gives them.
  ///
  /// inputs: those of inputs(). For the layer: x [B, N, dim], context [B, M, context_dim], and where the model has them mask
  /// [B, N] and context_mask [B, M] (bool, bytes of 0 and 1, true where a position is real; all true where left out) and
  /// rel_pos_bias. On the CPU nothing is copied. What padding holds shows in no live row: docs/padding.md.
  /// Throws InputError before anything is run, EngineError where the run fails.
  Outputs run(const Inputs& inputs, const RunOptions& options = {}) const;

  /// Runs the model and writes into the caller's memory: one view for every output, of its type and shape.
  ///
  /// With options.stream and every output on the GPU the work is queued on that stream and the call does not wait for it;
  /// what lies on the GPU must live until the stream has done it, and host inputs are read when the call returns. Otherwise
  /// the results are there when the call returns.
  /// Outputs may overlap neither each other nor an input, and memory on the GPU is aligned to 256 bytes.
  /// After an EngineError the outputs hold nothing that may be used.
  void run_into(const Inputs& inputs, const OutputViews& outputs, const RunOptions& options = {}) const;

  /// Zeros for every input at these sizes, one for each of dims(), in order; for the layer {B, N, M}. Throws InputError where
  /// the model does not take them, before memory is asked for.
  std::vector<std::pair<std::string, Tensor>> zeros(const Shape& sizes) const;

  /// Runs once for each of these sizes; none: at the bundle's optimal ones. Throws what zeros and run throw.
  void warmup(const std::vector<Shape>& sizes = {}) const;

  /// Runs the bundle's own inputs and holds the outputs to their bounds. Throws ParityError.
  void selftest() const;

  const Signature& signature() const;
  const std::vector<TensorInfo>& inputs() const;
  const std::vector<TensorInfo>& outputs() const;
  const Dims& dims() const;
  Backend backend() const;
  Precision precision() const;
  const Explanation& explain() const;
  Trust trust() const;

  /// The same as JSON: trust, trust_said, backend, precision, inputs, outputs, dims, chosen, passed_over.
  std::string describe() const;

  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

 private:
  struct __attribute__((visibility("hidden"))) State;
  explicit Session(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

BCA_API const char* name_of(Backend backend);          // as Python writes it: "onnxruntime-cpu"
BCA_API const char* name_of(Precision precision);      // "fp32"
BCA_API const char* name_of(Trust trust);              // "on-trust"
BCA_API Backend backend_of(const std::string& name);   // throws InputError with the nearest name
BCA_API Precision precision_of(const std::string& name);

}  // namespace bca
