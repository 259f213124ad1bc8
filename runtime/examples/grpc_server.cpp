// A server of the Open Inference Protocol over gRPC on the library: one bundle, one model, many clients at once.
//
//   grpc_server BUNDLE [--name model] [--address 127.0.0.1:8001] [--max-message-mb 64] [--concurrency 2] [--queue 64]
//               [--time-limit-ms 10000] [--grace-ms 10000] [--threads N]
//
// A request waits for one of `concurrency` places, at most its own deadline and the server's time limit; a full queue is told
// so at once. After SIGTERM or SIGINT the server is not ready and lets those at work end, for `grace-ms` at most; meanwhile, and
// for half a second more, it answers new ones with UNAVAILABLE. It has gRPC's own health service, for probes of Kubernetes, and
// reflection, for grpcurl.
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/support/server_interceptor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <map>
#include <mutex>
#include <thread>

#include <bca/session.hpp>

#include "inference.grpc.pb.h"

namespace {

using Clock = std::chrono::system_clock;
using grpc::Status;
using grpc::StatusCode;

constexpr const char* kVersion = "1";  // of the model: a bundle has no other
constexpr int kMost = 1'000'000'000, kMostMegabytes = 2047;  // a message's size is an int to gRPC
constexpr std::size_t kLongestText = 1000;  // of a refusal, in bytes: it repeats what the client sent, and clients take 8 kB of headers

struct Settings {
  std::string bundle, name = "model", address = "127.0.0.1:8001";
  int max_message_mb = 64, concurrency = 2, queue = 64, time_limit_ms = 10'000, grace_ms = 10'000, threads = 0;
};

/// A refusal; its text is cut where the client's own words make it long.
Status refusal(StatusCode code, std::string text) {
  if (text.size() <= kLongestText) return {code, text};
  std::size_t end = kLongestText;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // not inside a character
  return {code, text.substr(0, end) + "..."};
}

/// gRPC refuses a message that cannot be read by itself, as an error of the server and without a word.
class UnreadableMessages final : public grpc::experimental::Interceptor {
 public:
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_STATUS)) {
      const Status status = methods->GetSendStatus();
      if (status.error_code() == StatusCode::INTERNAL && status.error_message().empty()) {
        methods->ModifySendStatus({StatusCode::INVALID_ARGUMENT, "the message cannot be read as what this call takes; send what inference.proto says"});
      }
    }
    methods->Proceed();
  }
};

class UnreadableMessagesFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo*) override { return new UnreadableMessages; }
};

/// A bounded number of requests at work, and a bounded number waiting.
class Places {
 public:
  Places(int all, int most_waiting) : all_(all), free_(all), most_waiting_(most_waiting) {}

  /// OK with a place taken, or why there is none.
  Status take(Clock::time_point until) {
    std::unique_lock lock(mutex_);
    if (free_ == 0 && waiting_ >= most_waiting_) {
      return {StatusCode::RESOURCE_EXHAUSTED, std::to_string(waiting_) + " requests are waiting already; try again later"};
    }
    ++waiting_;
    const bool found = changed_.wait_until(lock, until, [this] { return free_ > 0; });
    --waiting_;
    changed_.notify_all();
    if (!found) return {StatusCode::DEADLINE_EXCEEDED, "no place became free in time; try again later"};
    --free_;
    return Status::OK;
  }
  void give() {
    const std::lock_guard lock(mutex_);
    ++free_;
    changed_.notify_all();
  }
  /// Returns when nobody is at work or waits, or then.
  void wait_until_left(Clock::time_point until) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, until, [this] { return free_ == all_ && waiting_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  const int all_;
  int free_, waiting_ = 0;
  const int most_waiting_;
};

/// Gives a taken place back at the end of its scope.
struct Given {
  Places& places;
  ~Given() { places.give(); }
};

// The protocol's names of the element types that a request may have.
const std::map<std::string, bca::DType>& types() {
  static const std::map<std::string, bca::DType> all = {
      {"FP32", bca::DType::Float32}, {"FP16", bca::DType::Float16}, {"BF16", bca::DType::BFloat16}, {"FP64", bca::DType::Float64},
      {"BOOL", bca::DType::Bool},    {"INT8", bca::DType::Int8},    {"UINT8", bca::DType::UInt8},   {"INT16", bca::DType::Int16},
      {"UINT16", bca::DType::UInt16}, {"INT32", bca::DType::Int32}, {"UINT32", bca::DType::UInt32}, {"INT64", bca::DType::Int64},
      {"UINT64", bca::DType::UInt64}};
  return all;
}

std::string protocol_name(bca::DType dtype) {
  const auto found = std::find_if(types().begin(), types().end(), [&](const auto& type) { return type.second == dtype; });
  return found->first;
}

using InputTensor = inference::ModelInferRequest::InferInputTensor;

/// The memory of an input, where the message has it; no copy.
std::pair<const void*, std::size_t> memory_of(const InputTensor& input, const std::string* raw, bca::DType dtype) {
  if (raw) return {raw->data(), raw->size()};
  const auto& contents = input.contents();
  if (dtype == bca::DType::Float32) return {contents.fp32_contents().data(), contents.fp32_contents().size() * sizeof(float)};
  if (dtype == bca::DType::Bool) return {contents.bool_contents().data(), contents.bool_contents().size() * sizeof(bool)};
  throw bca::InputError("input " + input.name() + ": " + input.datatype() + " comes in raw_input_contents only");
}

bca::View view_of(const InputTensor& input, const std::string* raw) {
  const auto type = types().find(input.datatype());
  if (type == types().end()) throw bca::InputError("input " + input.name() + " has datatype '" + input.datatype() + "', which no model takes");
  const bca::Shape shape(input.shape().begin(), input.shape().end());
  const auto [data, bytes] = memory_of(input, raw, type->second);
  const std::size_t wanted = bca::count_of(shape) * bca::size_of(type->second);
  if (bytes != wanted) {
    throw bca::InputError("input " + input.name() + " has " + std::to_string(bytes) + " bytes of data, and its shape needs " + std::to_string(wanted));
  }
  return {data, type->second, shape};
}

bca::Inputs inputs_of(const inference::ModelInferRequest& request) {
  for (const InputTensor& input : request.inputs()) {
    if (!input.parameters().count("shared_memory_region")) continue;
    throw bca::InputError("input " + input.name() + ": this server has no shared memory; send the data in the request");
  }
  const int raws = request.raw_input_contents_size();
  if (raws && raws != request.inputs_size()) {
    throw bca::InputError(std::to_string(request.inputs_size()) + " inputs, and " + std::to_string(raws) + " raw contents; give one for each");
  }
  bca::Inputs inputs;
  for (int i = 0; i < request.inputs_size(); ++i) {
    inputs.emplace_back(request.inputs(i).name(), view_of(request.inputs(i), raws ? &request.raw_input_contents(i) : nullptr));
  }
  return inputs;
}

class Service final : public inference::GRPCInferenceService::Service {
 public:
  Service(bca::Session session, const Settings& settings)
      : session_(std::move(session)), settings_(settings), places_(settings.concurrency, settings.queue) {}

  /// Takes no more requests; returns when those it has are done, or then.
  void stop(Clock::time_point until) {
    ready_ = false;
    places_.wait_until_left(until);
  }

  Status ServerLive(grpc::ServerContext*, const inference::ServerLiveRequest*, inference::ServerLiveResponse* response) override {
    response->set_live(true);
    return Status::OK;
  }
  Status ServerReady(grpc::ServerContext*, const inference::ServerReadyRequest*, inference::ServerReadyResponse* response) override {
    response->set_ready(ready_);
    return Status::OK;
  }
  Status ModelReady(grpc::ServerContext*, const inference::ModelReadyRequest* request, inference::ModelReadyResponse* response) override {
    response->set_ready(ready_);
    return check_model(request->name(), request->version());
  }
  Status ServerMetadata(grpc::ServerContext*, const inference::ServerMetadataRequest*, inference::ServerMetadataResponse* response) override {
    response->set_name("bca grpc_server");
    response->set_version("0.1.0");
    return Status::OK;
  }
  Status ModelMetadata(grpc::ServerContext*, const inference::ModelMetadataRequest* request, inference::ModelMetadataResponse* response) override {
    if (const Status status = check_model(request->name(), request->version()); !status.ok()) return status;
    response->set_name(settings_.name);
    response->add_versions(kVersion);
    response->set_platform(bca::name_of(session_.backend()));
    for (const auto& tensor : session_.inputs()) describe(tensor, response->add_inputs());
    for (const auto& tensor : session_.outputs()) describe(tensor, response->add_outputs());
    return Status::OK;
  }
  Status ModelInfer(grpc::ServerContext* context, const inference::ModelInferRequest* request, inference::ModelInferResponse* response) override {
    if (!ready_) return {StatusCode::UNAVAILABLE, "the server is stopping; ask another"};
    if (const Status status = check_model(request->model_name(), request->model_version()); !status.ok()) return status;
    const auto limit = Clock::now() + std::chrono::milliseconds(settings_.time_limit_ms);
    if (const Status status = places_.take(std::min(limit, context->deadline())); !status.ok()) return status;
    const Given given{places_};
    return context->IsCancelled() ? Status(StatusCode::CANCELLED, "the client has gone") : infer(*request, *response);
  }

 private:
  Status check_model(const std::string& name, const std::string& version) const {
    if (name != settings_.name) return refusal(StatusCode::NOT_FOUND, "there is no model '" + name + "' here; there is " + settings_.name);
    if (version.empty() || version == kVersion) return Status::OK;
    return refusal(StatusCode::NOT_FOUND, "there is no version '" + version + "' of " + name + " here; there is " + kVersion + ", or leave it out");
  }

  static void describe(const bca::TensorInfo& tensor, inference::ModelMetadataResponse::TensorMetadata* described) {
    described->set_name(tensor.name);
    described->set_datatype(protocol_name(tensor.dtype));
    for (const bca::Axis& axis : tensor.axes) {
      const auto* fixed = std::get_if<std::int64_t>(&axis);
      described->add_shape(fixed ? *fixed : -1);
    }
  }

  Status infer(const inference::ModelInferRequest& request, inference::ModelInferResponse& response) const {
    try {
      const std::vector<std::string> names = wanted(request);  // refused before anything is run
      const bca::Outputs outputs = session_.run(inputs_of(request));
      response.set_model_name(settings_.name);
      response.set_model_version(kVersion);
      response.set_id(request.id());
      for (const std::string& name : names) write(name, outputs.at(name), response);
      return Status::OK;
    } catch (const bca::InputError& error) {
      return refusal(StatusCode::INVALID_ARGUMENT, error.what());
    } catch (const std::exception& error) {
      return refusal(StatusCode::INTERNAL, error.what());
    }
  }

  /// Each at most once: a few bytes of the request ask for a whole tensor.
  std::vector<std::string> wanted(const inference::ModelInferRequest& request) const {
    std::vector<std::string> known, names;
    for (const auto& tensor : session_.outputs()) known.push_back(tensor.name);
    for (const auto& output : request.outputs()) {
      const auto is_in = [&](const std::vector<std::string>& all) { return std::find(all.begin(), all.end(), output.name()) != all.end(); };
      if (!is_in(known)) throw bca::InputError("the model has no output '" + output.name() + "'");
      if (is_in(names)) throw bca::InputError("output " + output.name() + " is asked for twice");
      names.push_back(output.name());
    }
    return names.empty() ? known : names;
  }

  static void write(const std::string& name, const bca::Tensor& tensor, inference::ModelInferResponse& response) {
    auto* output = response.add_outputs();
    output->set_name(name);
    output->set_datatype(protocol_name(tensor.dtype()));
    for (const std::int64_t size : tensor.shape()) output->add_shape(size);
    response.add_raw_output_contents()->assign(static_cast<const char*>(tensor.data()), tensor.bytes());
  }

  const bca::Session session_;
  const Settings settings_;
  Places places_;
  std::atomic<bool> ready_{true};
};

int number(const std::string& flag, const std::string& text, int most) {
  std::size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used != text.size() || text.empty() || value < 1 || value > most) {
    throw bca::InputError(flag + " is '" + text + "'; it must be a whole number from 1 to " + std::to_string(most));
  }
  return value;
}

Settings settings_from(const std::vector<std::string>& words) {
  Settings all;
  std::map<std::string, std::string*> texts = {{"--name", &all.name}, {"--address", &all.address}};
  std::map<std::string, int*> numbers = {{"--max-message-mb", &all.max_message_mb}, {"--concurrency", &all.concurrency},
                                         {"--queue", &all.queue}, {"--time-limit-ms", &all.time_limit_ms}, {"--grace-ms", &all.grace_ms}, {"--threads", &all.threads}};
  for (std::size_t i = 0; i < words.size(); ++i) {
    const bool has_value = i + 1 < words.size();
    if (words[i].rfind("--", 0) != 0 && all.bundle.empty()) all.bundle = words[i];
    else if (texts.count(words[i]) && has_value) *texts[words[i]] = words[i + 1], ++i;
    else if (numbers.count(words[i]) && has_value) *numbers[words[i]] = number(words[i], words[i + 1], words[i] == "--max-message-mb" ? kMostMegabytes : kMost), ++i;
    else throw bca::InputError("'" + words[i] + "' is unknown or lacks its value; the top of grpc_server.cpp lists the options");
  }
  if (all.bundle.empty()) throw bca::InputError("no bundle is given; grpc_server BUNDLE [--name model] [--address 127.0.0.1:8001] ...");
  return all;
}

bca::Session open_ready(const Settings& settings) {
  bca::Options options;
  options.threads = settings.threads;
  options.spinning = false;  // requests come with pauses, and waiting ones need the cores
  bca::Session session = bca::Session::open(settings.bundle, options);
  session.selftest();
  session.warmup();
  return session;
}

int serve(const Settings& settings) {
  sigset_t stops;
  sigemptyset(&stops);
  sigaddset(&stops, SIGTERM);
  sigaddset(&stops, SIGINT);
  pthread_sigmask(SIG_BLOCK, &stops, nullptr);  // inherited by every thread made from here on

  Service service(open_ready(settings), settings);
  int port = 0;
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(std::make_unique<UnreadableMessagesFactory>());
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  builder.AddListeningPort(settings.address, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a port in use is an error
  builder.SetMaxReceiveMessageSize(settings.max_message_mb << 20);
  builder.SetMaxSendMessageSize(settings.max_message_mb << 20);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (!server) throw bca::Error(settings.address + " cannot be listened on; choose another --address");
  server->GetHealthCheckService()->SetServingStatus(inference::GRPCInferenceService::service_full_name(), true);  // "" is of the server
  std::cout << "listening on port " << port << ", model " << settings.name << std::endl;

  int signal = 0;
  sigwait(&stops, &signal);
  const auto end = Clock::now() + std::chrono::milliseconds(settings.grace_ms);
  server->GetHealthCheckService()->SetServingStatus(false);
  service.stop(end);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));  // gRPC would drop what comes during its shutdown
  server->Shutdown(end);
  std::cout << "stopped" << std::endl;
  return 0;
}

}  // namespace

int main(int count, char** values) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // else ONNX Runtime writes an id into the home directory, or warns that it cannot
  try {
    return serve(settings_from(std::vector<std::string>(values + 1, values + count)));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
