#include "bca/bca.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "bca/session.hpp"
#include "text.hpp"

struct bca_session {
  bca::Session session;
  std::string description;
};

namespace {

// The C interface's only memory besides sessions: C has no exceptions to carry it.
thread_local std::string last_error;

bca_status failed(bca_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {  // no memory even for the message
    last_error.clear();
  }
  return status;
}

template <typename Call> bca_status guarded(Call call) noexcept {
  try {
    call();
    return BCA_OK;
  } catch (const bca::InputError& error) {
    return failed(BCA_INPUT_ERROR, error.what());
  } catch (const bca::BundleError& error) {
    return failed(BCA_BUNDLE_ERROR, error.what());
  } catch (const bca::EngineError& error) {
    return failed(BCA_ENGINE_ERROR, error.what());
  } catch (const bca::MissingDependencyError& error) {
    return failed(BCA_MISSING_LIBRARY, error.what());
  } catch (const bca::ParityError& error) {
    return failed(BCA_PARITY_ERROR, error.what());
  } catch (const std::exception& error) {
    return failed(BCA_OTHER_ERROR, error.what());
  } catch (...) {
    return failed(BCA_OTHER_ERROR, "an unknown error");
  }
}

constexpr std::size_t kMostBytes = 4096;                              // of a structure; an address, or what was never set, is more
constexpr std::size_t kLeastTensorBytes = offsetof(bca_tensor, memory);  // what the first callers had, and where none has less

/// What the caller's version of the structure has, and zeros for the rest.
template <typename T> T known_part(const void* given, std::size_t least, const char* what) {
  std::size_t size;
  std::memcpy(&size, given, sizeof size);
  if (size < least || size > kMostBytes) throw bca::InputError(std::string(what) + " size is not set; set it to sizeof of the structure");
  T known{};
  std::memcpy(&known, given, std::min(size, sizeof(T)));
  return known;
}

template <typename T> T known_part(const T* given) { return given ? known_part<T>(given, sizeof(std::size_t), "the options'") : T{}; }

std::string text_of(const char* text) { return text ? text : ""; }

bca::Options options_of(const bca_open_options* given) {
  const auto from = known_part(given);
  bca::Options options;
  if (from.backend) options.backend = bca::backend_of(from.backend);
  if (from.precision) options.precision = bca::precision_of(from.precision);
  options.verify = static_cast<bca::Verify>(from.verify);
  options.threads = from.threads;
  options.onnxruntime_library = text_of(from.onnxruntime_library);
  options.tensorrt_library = text_of(from.tensorrt_library);
  options.cuda_library = text_of(from.cuda_library);
  options.device = from.device;
  if (from.contexts) options.contexts = from.contexts;
  options.host_code = from.host_code != 0;
  options.spinning = from.no_spinning == 0;
  return options;
}

bca::RunOptions options_of(const bca_run_options* given) {
  const auto from = known_part(given);
  return {from.cast != 0, from.stream};
}

void check(const bca_tensor& tensor) {
  if (!tensor.name) throw bca::InputError("a tensor without a name");
  const bool right = tensor.rank >= 0 && (tensor.shape || tensor.rank == 0);
  if (!right) throw bca::InputError(std::string("tensor ") + tensor.name + " has no shape");
}

template <typename Views> Views views_of(const bca_tensor* tensors, std::size_t count) {
  if (count && !tensors) throw bca::InputError("the list of tensors is null");
  Views views;
  const auto* at = reinterpret_cast<const unsigned char*>(tensors);
  for (std::size_t i = 0; i < count; ++i, at += tensors->size) {  // the caller's tensors may be shorter or longer
    const auto t = known_part<bca_tensor>(at, kLeastTensorBytes, "a tensor's");
    if (t.size != tensors->size) throw bca::InputError("the tensors of a list differ in size; set each to sizeof of the structure");
    check(t);
    const bca::Shape shape(t.shape, t.shape + t.rank);
    views.emplace_back(t.name, typename Views::value_type::second_type(t.data, static_cast<bca::DType>(t.dtype), shape, static_cast<bca::Memory>(t.memory)));
  }
  return views;
}

const bca::Session& session_of(const bca_session* session) {
  if (!session) throw bca::InputError("the session is null; open one with bca_open");
  return session->session;
}

}  // namespace

bca_status bca_open(const char* bundle, const bca_open_options* options, bca_session** session) {
  return guarded([&] {
    if (!bundle || !session) throw bca::InputError("bca_open needs a path and a place for the session");
    *session = nullptr;
    bca::Session opened = bca::Session::open(bundle, options_of(options));
    std::string description = opened.describe();
    *session = new bca_session{std::move(opened), std::move(description)};
  });
}

bca_status bca_run(const bca_session* session, const bca_tensor* inputs, size_t input_count, const bca_tensor* outputs, size_t output_count,
                   const bca_run_options* options) {
  return guarded([&] {
    session_of(session).run_into(views_of<bca::Inputs>(inputs, input_count), views_of<bca::OutputViews>(outputs, output_count), options_of(options));
  });
}

const char* bca_describe(const bca_session* session) { return session ? session->description.c_str() : ""; }

bca_status bca_selftest(const bca_session* session) {
  return guarded([&] { session_of(session).selftest(); });
}

const char* bca_last_error(void) { return last_error.c_str(); }

void bca_close(bca_session* session) { delete session; }

const char* bca_version(void) { return BCA_VERSION; }
