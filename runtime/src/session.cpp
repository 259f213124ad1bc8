#include "bca/session.hpp"

#include <algorithm>

#include "backends.hpp"
#include "contract.hpp"
#include "enums.hpp"
#include "selftest.hpp"
#include "text.hpp"

namespace bca {
namespace {

constexpr std::uintptr_t kGpuAlignment = 256;  // what TensorRT asks of addresses
constexpr int kMostThreads = 1024;             // ONNX Runtime tries to make any number, and the process hangs

std::vector<std::string> names_in(const OutputViews& outputs) {
  std::vector<std::string> names;
  for (const auto& [name, view] : outputs) names.push_back(name);
  return names;
}

void check_output(const TensorInfo& tensor, const MutableView& view, const Shape& wanted) {
  if (view.shape == wanted && view.dtype == tensor.dtype && view.data) return;
  throw InputError("output " + tensor.name + " is " + text::shown(view.shape) + " " + name_of(view.dtype) + (view.data ? "" : " at null") +
                   "; a writable, C-contiguous array of " + text::shown(wanted) + " " + name_of(tensor.dtype) + " is needed");
}

/// Null and empty memory overlap nothing.
template <typename Left, typename Right> bool overlap(const Left& a, const Right& b) {
  const auto start = [](const auto& view) { return reinterpret_cast<std::uintptr_t>(view.data); };
  const auto bytes = [](const auto& view) { return count_of(view.shape) * size_of(view.dtype); };
  return a.data && b.data && start(a) < start(b) + bytes(b) && start(b) < start(a) + bytes(a);
}

/// A model writes an output while it still reads its inputs.
void check_overlaps(const Inputs& inputs, const OutputViews& outputs) {
  const auto refuse = [](const std::string& output, const std::string& other) {
    throw InputError("output " + output + " overlaps " + other + " in memory; give each output memory of its own");
  };
  for (auto one = outputs.begin(); one != outputs.end(); ++one) {
    for (auto other = outputs.begin(); other != one; ++other) {
      if (overlap(one->second, other->second)) refuse(one->first, "output " + other->first);
    }
    for (const auto& [name, view] : inputs) {
      if (overlap(one->second, view)) refuse(one->first, "input " + name);
    }
  }
}

void check_options(const Options& options) {
  name_of(options.backend);
  if (options.precision) name_of(*options.precision);
  enums::name("verify", options.verify, enums::kVerifies);
  if (options.threads < 0 || options.threads > kMostThreads) {
    throw InputError("threads is " + std::to_string(options.threads) + "; it must be at least 1 and at most " + std::to_string(kMostThreads) +
                     ", or 0 for every core");
  }
  if (options.contexts < 1) throw InputError("contexts is " + std::to_string(options.contexts) + "; it must be at least 1");
}

}  // namespace

struct Session::State {
  Bundle bundle;
  std::unique_ptr<Runner> runner;
  Explanation explanation;
  Contract contract;

  const RunnerInfo& info() const { return runner->info; }
  template <typename AnyView> void check_memory(const AnyView& view, const char* kind, const std::string& name) const;
  Ready ready(const Inputs& inputs, const RunOptions& options) const;
  std::vector<MutableView> in_order(const OutputViews& outputs, const Sizes& sizes) const;
};

template <typename AnyView> void Session::State::check_memory(const AnyView& view, const char* kind, const std::string& name) const {
  enums::check(kind, name, view);
  if (view.memory == Memory::Cpu) return;
  if (!runner->on_gpu()) {
    throw InputError(std::string(kind) + " " + name + " is on cuda, and this session runs on " + name_of(info().backend) +
                     ", which takes host memory; copy it, or open with an engine");
  }
  const std::uintptr_t beyond = reinterpret_cast<std::uintptr_t>(view.data) % kGpuAlignment;
  if (beyond == 0) return;
  throw InputError(std::string(kind) + " " + name + " lies " + std::to_string(beyond) + " bytes beyond a multiple of " +
                   std::to_string(kGpuAlignment) + ", and engines take GPU memory at multiples alone; copy it to the start of an allocation");
}

Ready Session::State::ready(const Inputs& inputs, const RunOptions& options) const {
  for (const auto& [name, view] : inputs) check_memory(view, "input", name);
  if (options.stream && !runner->on_gpu()) {
    throw InputError(std::string("a stream is given, and this session runs on ") + name_of(info().backend) + ", which has none; leave it out");
  }
  return contract.check(inputs, options.cast);
}

/// The caller's outputs in the model's order, every one of them and no other.
std::vector<MutableView> Session::State::in_order(const OutputViews& outputs, const Sizes& sizes) const {
  std::vector<MutableView> ordered;
  std::vector<std::string> known;
  for (const TensorInfo& tensor : info().signature.outputs) {
    known.push_back(tensor.name);
    const auto found = std::find_if(outputs.begin(), outputs.end(), [&](const auto& given) { return given.first == tensor.name; });
    if (found == outputs.end()) continue;
    check_memory(found->second, "output", tensor.name);
    check_output(tensor, found->second, shape_at(tensor.axes, sizes));
    ordered.push_back(found->second);
  }
  // Every name was looked up once: a name too many, unknown or given twice, shows in the count.
  if (ordered.size() == known.size() && ordered.size() == outputs.size()) return ordered;
  throw InputError("outputs " + text::join(names_in(outputs)) + " were given, and the model has " + text::join(known));
}

Session Session::open(const std::filesystem::path& path, const Options& options) {
  check_options(options);
  Bundle bundle = open_bundle(path, options.verify);
  auto [runner, explanation] = choose(bundle, options);
  Contract contract(runner->info.signature, runner->info.profiles, bundle.manifest.left_out);
  return Session(std::unique_ptr<State>(new State{std::move(bundle), std::move(runner), std::move(explanation), std::move(contract)}));
}

Outputs Session::run(const Inputs& inputs, const RunOptions& options) const {
  const Ready ready = state_->ready(inputs, options);
  Outputs outputs;
  std::vector<MutableView> views;
  for (const TensorInfo& tensor : state_->info().signature.outputs) {
    views.push_back(outputs.emplace(tensor.name, Tensor(tensor.dtype, shape_at(tensor.axes, ready.sizes))).first->second);
  }
  state_->runner->run(ready.views, views, options.stream);
  return outputs;
}

void Session::run_into(const Inputs& inputs, const OutputViews& outputs, const RunOptions& options) const {
  const Ready ready = state_->ready(inputs, options);
  const std::vector<MutableView> ordered = state_->in_order(outputs, ready.sizes);
  check_overlaps(inputs, outputs);
  state_->runner->run(ready.views, ordered, options.stream);
}

std::vector<std::pair<std::string, Tensor>> Session::zeros(const Shape& shape) const {
  const Sizes sizes = named(dims(), shape);
  state_->contract.check(sizes);
  std::vector<std::pair<std::string, Tensor>> made;
  for (const TensorInfo& tensor : inputs()) made.emplace_back(tensor.name, Tensor::zeros(tensor.dtype, shape_at(tensor.axes, sizes)));
  return made;
}

void Session::warmup(const std::vector<Shape>& shapes) const {
  Shape best;
  for (const auto& dim : dims()) best.push_back(dim.second.opt);
  for (const Shape& shape : shapes.empty() ? std::vector<Shape>{best} : shapes) {
    const auto arrays = zeros(shape);
    run(Inputs(arrays.begin(), arrays.end()));
  }
}

void Session::selftest() const {
  const auto arrays = selftest::read(state_->bundle.path("selftest.npz"));
  const auto failures = selftest::failures(arrays, name_of(precision()), [this](const Inputs& inputs) { return run(inputs, {true, nullptr}); });
  if (!failures.empty()) throw ParityError(text::join(failures, "; "));
}

const Signature& Session::signature() const { return state_->info().signature; }
const std::vector<TensorInfo>& Session::inputs() const { return signature().inputs; }
const std::vector<TensorInfo>& Session::outputs() const { return signature().outputs; }
const Dims& Session::dims() const { return signature().dims; }
Backend Session::backend() const { return state_->info().backend; }
Precision Session::precision() const { return state_->info().precision; }
const Explanation& Session::explain() const { return state_->explanation; }
Trust Session::trust() const { return state_->bundle.manifest.trust; }
std::string Session::describe() const { return to_json(*this); }

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

}  // namespace bca
