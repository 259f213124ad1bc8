// bca-run: one bundle from .npy files to .npy files, its self-test, or a benchmark.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>

#include "bca/session.hpp"
#include "npy.hpp"
#include "text.hpp"

namespace {

constexpr const char* kUsage = R"(bca-run BUNDLE [options]

  --input NAME=FILE.npy     an input; FILE.npz gives every array in it; masks may be left out
  --output NAME=FILE.npy    where an output goes; repeat for each that you want
  --repeat N                run N times (default 1; with --bench 100)
  --bench                   time the runs, after 3 that are not counted; percentiles as JSON
  --shape BxNxM             zeros of these sizes, one for each dimension, where no input is given (default: the optimal sizes)
  --selftest                run the bundle's own inputs and hold the outputs to their bounds
  --describe                what runs, as JSON
  --backend NAME            auto, tensorrt, rtx, onnxruntime-cuda, onnxruntime-cpu (default auto)
  --precision NAME          fp32, fp16, bf16 (default: the backend's best)
  --threads N               of ONNX Runtime on the CPU (default: every core)
  --verify HOW              full, size, off (default full)
  --ort FILE                libonnxruntime.so (default: $BCA_ORT_LIBRARY, then the loader's)
  --cast                    take other floating-point types, and masks of 0 and 1

Exit codes: 0 done, 1 out of the self-test's bounds, 2 bad input.
)";

struct Arguments {
  std::string bundle, shape;
  std::vector<std::string> inputs, outputs;
  int repeat = 0;
  bool bench = false, selftest = false, describe = false;
  bca::Options options;
  bca::RunOptions run;
};

int number(const std::string& flag, const std::string& text, int least) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end || value < least || value > 1'000'000'000) {
    throw bca::InputError(flag + " is '" + text + "'; it must be a whole number of at least " + std::to_string(least));
  }
  return static_cast<int>(value);
}

bca::Verify verify_of(const std::string& name) {
  if (name == "full") return bca::Verify::Full;
  if (name == "size") return bca::Verify::Size;
  if (name == "off") return bca::Verify::Off;
  throw bca::InputError("--verify is '" + name + "'; allowed: full, size, off");
}

bool take_switch(Arguments& all, const std::string& flag) {
  if (flag == "--bench") return all.bench = true;
  if (flag == "--selftest") return all.selftest = true;
  if (flag == "--describe") return all.describe = true;
  if (flag == "--cast") return all.run.cast = true;
  return false;
}

void take_value(Arguments& all, const std::string& flag, const std::string& value) {
  if (flag == "--input") all.inputs.push_back(value);
  else if (flag == "--output") all.outputs.push_back(value);
  else if (flag == "--repeat") all.repeat = number(flag, value, 1);
  else if (flag == "--shape") all.shape = value;
  else if (flag == "--backend") all.options.backend = bca::backend_of(value);
  else if (flag == "--precision") all.options.precision = bca::precision_of(value);
  else if (flag == "--threads") all.options.threads = number(flag, value, 1);
  else if (flag == "--verify") all.options.verify = verify_of(value);
  else if (flag == "--ort") all.options.onnxruntime_library = value;
  else throw bca::InputError("there is no option " + flag + "; bca-run --help lists them");
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments all;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (words[i].rfind("--", 0) != 0) {
      if (!all.bundle.empty()) throw bca::InputError("two bundles are given, " + all.bundle + " and " + words[i]);
      all.bundle = words[i];
    } else if (!take_switch(all, words[i])) {
      if (i + 1 == words.size()) throw bca::InputError("option " + words[i] + " is unknown or lacks its value; bca-run --help lists them");
      take_value(all, words[i], words[i + 1]);
      ++i;
    }
  }
  if (all.bundle.empty()) throw bca::InputError("no bundle is given; bca-run BUNDLE --help tells the rest");
  if (!all.outputs.empty() && all.inputs.empty() && !all.bench) {
    throw bca::InputError("--output is given, and nothing is run that it could come from; give --input or --bench too, or leave it out");
  }
  return all;
}

std::pair<std::string, std::string> name_and_file(const std::string& flag, const std::string& assignment) {
  const std::size_t at = assignment.find('=');
  if (at == std::string::npos || at == 0) throw bca::InputError(flag + " is '" + assignment + "'; give NAME=FILE.npy");
  return {assignment.substr(0, at), assignment.substr(at + 1)};
}

/// A sample file may carry the expected outputs too.
bool is_output(const bca::Session& session, const std::string& name) {
  return std::any_of(session.outputs().begin(), session.outputs().end(), [&](const auto& tensor) { return tensor.name == name; });
}

using Arrays = std::vector<std::pair<std::string, bca::Tensor>>;

Arrays read_inputs(const bca::Session& session, const std::vector<std::string>& assignments) {
  Arrays arrays;
  for (const std::string& assignment : assignments) {
    if (assignment.size() > 4 && assignment.substr(assignment.size() - 4) == ".npz") {
      for (auto& [name, array] : bca::npy::read_npz(assignment)) {
        if (!is_output(session, name)) arrays.emplace_back(name, std::move(array));
      }
    } else {
      const auto [name, file] = name_and_file("--input", assignment);
      arrays.emplace_back(name, bca::npy::read(file));
    }
  }
  return arrays;
}

/// BxNxM: one size for each dimension.
bca::Shape sizes_of(const std::string& shape) {
  bca::Shape sizes;
  std::istringstream parts(shape + "x");
  for (std::string part; std::getline(parts, part, 'x');) {
    if (part.empty() || part.size() > 18 || part.find_first_not_of("0123456789") != std::string::npos) {
      throw bca::InputError("--shape is '" + shape + "'; give a size for each dimension, such as 1x512x512");
    }
    sizes.push_back(std::stol(part));
  }
  return sizes;
}

Arrays zeros(const bca::Session& session, const std::string& shape) {
  bca::Shape sizes;
  for (const auto& dim : session.dims()) sizes.push_back(dim.second.opt);
  return session.zeros(shape.empty() ? sizes : sizes_of(shape));
}

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

/// The smallest value that at least this share of the sorted values does not exceed.
double percentile(const std::vector<double>& sorted, double share) {
  const auto rank = static_cast<std::size_t>(share * static_cast<double>(sorted.size()) + 0.999999);
  return sorted[std::min(std::max<std::size_t>(rank, 1), sorted.size()) - 1];
}

void bench(const bca::Session& session, const bca::Inputs& inputs, const Arguments& all, double open_ms) {
  bca::Outputs outputs = session.run(inputs, all.run);
  bca::OutputViews views;
  for (auto& [name, tensor] : outputs) views.emplace_back(name, tensor);
  std::vector<double> times_ms;
  const int runs = all.repeat ? all.repeat : 100;
  for (int i = 0; i < runs + 3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    session.run_into(inputs, views, all.run);
    if (i >= 3) times_ms.push_back(ms_since(start));
  }
  double sum = 0;
  for (const double time : times_ms) sum += time;
  std::sort(times_ms.begin(), times_ms.end());
  std::printf(R"({"backend": "%s", "precision": "%s", "runs": %d, "open_ms": %.3f, "mean_ms": %.4f, "min_ms": %.4f, )"
              R"("p50_ms": %.4f, "p90_ms": %.4f, "p99_ms": %.4f, "max_ms": %.4f})" "\n",
              bca::name_of(session.backend()), bca::name_of(session.precision()), runs, open_ms, sum / runs, times_ms.front(),
              percentile(times_ms, 0.5), percentile(times_ms, 0.9), percentile(times_ms, 0.99), times_ms.back());
}

void write_outputs(const bca::Outputs& outputs, const std::vector<std::string>& assignments) {
  std::vector<std::string> known;
  for (const auto& [name, tensor] : outputs) known.push_back(name);
  for (const std::string& assignment : assignments) {
    const auto [name, file] = name_and_file("--output", assignment);
    const auto found = outputs.find(name);
    if (found == outputs.end()) {
      throw bca::InputError("the model has no output '" + name + "'" + bca::text::nearest(name, known) + "; it has " + bca::text::join(known));
    }
    bca::npy::write(file, found->second);
  }
}

void run(const bca::Session& session, const bca::Inputs& inputs, const Arguments& all) {
  bca::Outputs outputs;
  for (int i = 0; i < std::max(all.repeat, 1); ++i) outputs = session.run(inputs, all.run);
  write_outputs(outputs, all.outputs);
}

void work(const Arguments& all) {
  const auto start = std::chrono::steady_clock::now();
  const bca::Session session = bca::Session::open(all.bundle, all.options);
  const double open_ms = ms_since(start);
  if (all.describe) std::cout << session.describe() << "\n";
  if (all.selftest) {
    session.selftest();
    std::cout << "self-test passed: " << session.explain().chosen << "\n";
  }
  if (all.inputs.empty() && !all.bench) {
    if (all.selftest || all.describe) return;
    throw bca::InputError("nothing to do: give --input, --bench, --selftest or --describe");
  }
  const Arrays arrays = all.inputs.empty() ? zeros(session, all.shape) : read_inputs(session, all.inputs);
  bca::Inputs inputs;
  for (const auto& [name, array] : arrays) inputs.emplace_back(name, array);
  if (all.bench) bench(session, inputs, all, open_ms);
  if (!all.bench || !all.outputs.empty()) run(session, inputs, all);
}

}  // namespace

int main(int count, char** values) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // else ONNX Runtime writes an id into the home directory, or warns that it cannot
  try {
    const std::vector<std::string> words(values + 1, values + count);
    if (words.empty() || std::find(words.begin(), words.end(), "--help") != words.end()) {
      std::cout << kUsage;
      return words.empty() ? 2 : 0;
    }
    work(parse(words));
    return 0;
  } catch (const bca::ParityError& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
