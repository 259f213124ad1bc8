// What the session costs over the bare ONNX Runtime C API: the same model, inputs and library, on one thread, call by call in
// turn in one process, so that whatever else the machine does falls on all of them alike. Prints medians as JSON.
//
//   overhead BUNDLE BxNxM RUNS
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "backends.hpp"
#include "denormals.hpp"
#include "ort_library.hpp"
#include "signature.hpp"
#include "support.hpp"

namespace {

/// The C API as one would call it by hand: values made once, names fixed.
class Bare {
 public:
  Bare(const std::string& file, const bca::Inputs& inputs, bca::Outputs& outputs) : library_(bca::OrtLibrary::open("")), api_(*library_->api) {
    OrtSessionOptions* options = nullptr;
    ok(api_.CreateSessionOptions(&options));
    ok(api_.SetIntraOpNumThreads(options, 1));
    ok(api_.AddSessionConfigEntry(options, "session.set_denormal_as_zero", "1"));
    ok(api_.CreateSession(library_->env, file.c_str(), options, &session_));
    ok(api_.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    for (const auto& [name, view] : inputs) names_.push_back(name.c_str()), values_.push_back(value(const_cast<void*>(view.data), view.dtype, view.shape));
    for (auto& [name, tensor] : outputs) output_names_.push_back(name.c_str()), outputs_.push_back(value(tensor.data(), tensor.dtype(), tensor.shape()));
  }
  void operator()() {
    const bca::Flushed flushed;
    ok(api_.Run(session_, nullptr, names_.data(), values_.data(), values_.size(), output_names_.data(), outputs_.size(), outputs_.data()));
  }

 private:
  void ok(OrtStatus* status) { library_->check(status, "onnxruntime failed"); }
  OrtValue* value(void* data, bca::DType dtype, const bca::Shape& shape) {
    OrtValue* made = nullptr;
    const auto type = dtype == bca::DType::Bool ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    ok(api_.CreateTensorWithDataAsOrtValue(memory_, data, bca::count_of(shape) * bca::size_of(dtype), shape.data(), shape.size(), type, &made));
    return made;
  }

  std::shared_ptr<bca::OrtLibrary> library_;
  const OrtApi& api_;
  OrtSession* session_ = nullptr;  // the process ends with them
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<const char*> names_, output_names_;
  std::vector<const OrtValue*> values_;
  std::vector<OrtValue*> outputs_;
};

double time_us(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

std::string model_file(const std::string& bundle, const bca::Session& session) {
  const std::string chosen = session.explain().chosen;  // onnxruntime-cpu: FILE on onnxruntime ...
  const std::size_t start = chosen.find(": ") + 2;
  return bundle + "/" + chosen.substr(start, chosen.find(" on ") - start);
}

void measure(const std::string& bundle, bca::Session& session, const bca::Inputs& inputs, int runs) {
  bca::Outputs outputs = session.run(inputs), bare_outputs = session.run(inputs);
  bca::OutputViews views;
  for (auto& [name, tensor] : outputs) views.emplace_back(name, tensor);
  Bare bare(model_file(bundle, session), inputs, bare_outputs);
  const std::function<void()> calls[] = {[&] { bare(); }, [&] { session.run_into(inputs, views); }, [&] { session.run(inputs); }};
  std::vector<double> times[3];
  for (int i = 0; i < runs + 20; ++i) {
    for (int which = 0; which < 3; ++which) {
      const double time = time_us(calls[(which + i) % 3]);  // each comes after each of the others
      if (i >= 20) times[(which + i) % 3].push_back(time);
    }
  }
  std::printf(R"({"bare_us": %.2f, "run_into_us": %.2f, "run_us": %.2f})" "\n", median(times[0]), median(times[1]), median(times[2]));
}

}  // namespace

int main(int count, char** values) {
  long sizes[3] = {};
  if (count != 4 || std::sscanf(values[2], "%ldx%ldx%ld", &sizes[0], &sizes[1], &sizes[2]) != 3) {
    std::fprintf(stderr, "overhead BUNDLE BxNxM RUNS\n");
    return 2;
  }
  bca::Options options;
  options.backend = bca::Backend::OnnxRuntimeCpu;
  options.threads = 1;
  bca::Session session = bca::Session::open(values[1], options);
  std::vector<bca::Tensor> arrays;
  bca::Inputs inputs;
  for (const bca::TensorInfo& tensor : session.inputs()) {
    arrays.emplace_back(tensor.dtype, bca::shape_at(tensor.axes, bca::named(session.dims(), {sizes[0], sizes[1], sizes[2]})));
    if (tensor.dtype == bca::DType::Float32) support::fill(arrays.back(), 1);
    else std::memset(arrays.back().data(), 1, arrays.back().bytes());
  }
  for (std::size_t i = 0; i < arrays.size(); ++i) inputs.emplace_back(session.inputs()[i].name, arrays[i]);
  measure(values[1], session, inputs, std::atoi(values[3]));
}
