// The one file that knows of the JSON library: it takes longer to compile than all the others together.
#include "manifest.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "text.hpp"

namespace bca {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;

/// A value and the way to it, so that an error can name the field. What is wrong is said in pydantic's words.
class Field {
 public:
  Field(const json& value, std::string way) : value_(value), way_(std::move(way)) {}

  Field operator[](const std::string& key) const {
    if (!value_.is_object()) fail("Input should be an object");
    const auto found = value_.find(key);
    if (found == value_.end()) Field(value_, joined(key)).fail("Field required");
    return {*found, joined(key)};
  }
  std::string string() const {
    if (!value_.is_string()) fail("Input should be a valid string");
    return value_.get<std::string>();
  }
  std::int64_t integer(std::int64_t least) const {
    const bool fits = value_.is_number_integer() && !(value_.is_number_unsigned() && value_.get<std::uint64_t>() > INT64_MAX);
    if (!fits) fail("Input should be a valid integer");
    if (value_.get<std::int64_t>() < least) fail("Input should be greater than or equal to " + std::to_string(least));
    return value_.get<std::int64_t>();
  }
  bool boolean() const {
    if (!value_.is_boolean()) fail("Input should be a valid boolean");
    return value_.get<bool>();
  }
  bool is_null() const { return value_.is_null(); }
  bool is_string() const { return value_.is_string(); }
  bool has(const char* key) const { return value_.is_object() && value_.contains(key); }

  template <typename Read> auto list(Read read, std::size_t least = 0) const {
    if (!value_.is_array()) fail("Input should be a valid list");
    if (value_.size() < least) fail("List should have at least " + std::to_string(least) + " item");
    std::vector<decltype(read(*this))> items;
    for (std::size_t i = 0; i < value_.size(); ++i) items.push_back(read(Field(value_[i], joined(std::to_string(i)))));
    return items;
  }
  template <typename Visit> void each(Visit visit) const {
    if (!value_.is_object()) fail("Input should be an object");
    for (const auto& [key, item] : value_.items()) visit(key, Field(item, joined(key)));
  }
  std::string one_of(const std::vector<std::string>& allowed) const {
    std::string found = string();
    if (std::find(allowed.begin(), allowed.end(), found) == allowed.end()) fail("Input should be one of " + text::join(allowed));
    return found;
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw BundleError("field " + way_ + ": " + why + "; export the bundle again");
  }

 private:
  std::string joined(const std::string& key) const { return way_.empty() ? key : way_ + "." + key; }

  const json& value_;
  std::string way_;
};

std::string read_sha256(const Field& field) {
  std::string digits = field.string();
  const bool right = digits.size() == 64 && digits.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!right) field.fail("String should match pattern '^[0-9a-f]{64}$'");
  return digits;
}

Precision read_precision(const Field& field) { return precision_of(field.one_of({"fp32", "fp16", "bf16"})); }

DimRange read_range(const Field& field) {
  const DimRange range{field["min"].integer(1), field["opt"].integer(1), field["max"].integer(1)};
  if (range.min > range.opt || range.opt > range.max) field.fail("needs 1 <= min <= opt <= max");
  return range;
}

Dims read_dims(const Field& field) {
  return {read_range(field["batch"]), read_range(field["x_len"]), read_range(field["context_len"])};
}

Axis read_axis(const Field& field) {
  if (field.is_string()) return field.one_of({"batch", "x_len", "context_len"});
  return field.integer(1);
}

TensorInfo read_tensor(const Field& field) {
  return {field["name"].string(), dtype_of(field["dtype"].one_of({"float32", "float16", "bfloat16", "bool"})),
          field["axes"].list(read_axis)};
}

ModelEntry read_model(const Field& field) {
  return {field["file"].string(), field["runtime"].one_of({"portable", "onnxruntime-cpu"}), read_precision(field["precision"]),
          field["inputs"].list(read_tensor, 1), field["outputs"].list(read_tensor, 1)};
}

EngineEntry read_engine(const Field& field) {
  EngineEntry entry{field["file"].string(), field["library"].one_of({"rtx", "tensorrt"}), field["version"].string(),
                    field["model"].string(), read_sha256(field["model_sha256"]), read_precision(field["precision"]), {}, {}, {}, {}, {}};
  entry.targets = field["targets"].list([](const Field& target) { return target.string(); });
  if (!field["gpu"].is_null()) entry.gpu_capability = field["gpu"]["compute_capability"].string();
  entry.profiles = field["profiles"].list(read_dims, 1);
  entry.inputs = field["inputs"].list(read_tensor, 1);
  entry.outputs = field["outputs"].list(read_tensor, 1);
  const Field options = field["options"];
  if (options.has("version_compatible")) entry.version_compatible = options["version_compatible"].boolean();
  if (options.has("hardware_compatibility")) entry.hardware_compatibility = options["hardware_compatibility"].string();
  return entry;
}

void check_format(const json& content, const std::string& shown) {
  const auto format = content.is_object() ? content.find("format") : content.end();
  if (content.is_object() && format != content.end() && format->is_number_integer() && format->get<std::int64_t>() > kFormat) {
    throw BundleError(shown + " is a bundle of format " + format->dump() + ", newer than the formats this version reads (up to " +
                      std::to_string(kFormat) + "); upgrade bca_runtime");
  }
}

Manifest read_manifest(const Field& field) {
  if (field["format"].integer(0) != kFormat) field["format"].fail("Input should be 1");
  Manifest manifest;
  manifest.dims = read_dims(field["dims"]);
  manifest.models = field["models"].list(read_model, 1);
  manifest.engines = field["engines"].list(read_engine);
  field["files"].each([&](const std::string& name, const Field& file) {
    manifest.files[name] = {file["bytes"].integer(0), read_sha256(file["sha256"])};
  });
  return manifest;
}

json axes_of(const std::vector<Axis>& axes) {
  json list = json::array();
  for (const Axis& axis : axes) std::visit([&](const auto& value) { list.push_back(value); }, axis);
  return list;
}

json tensors_of(const std::vector<TensorInfo>& tensors) {
  json list = json::array();
  for (const TensorInfo& t : tensors) list.push_back({{"name", t.name}, {"dtype", name_of(t.dtype)}, {"axes", axes_of(t.axes)}});
  return list;
}

json range_of(const DimRange& range) { return {{"min", range.min}, {"opt", range.opt}, {"max", range.max}}; }

}  // namespace

Manifest parse_manifest(const std::string& text, const std::string& shown, const std::string& path) {
  try {
    const json content = json::parse(text);
    check_format(content, shown);
    return read_manifest(Field(content, ""));
  } catch (const json::exception& error) {
    throw BundleError(path + " is not JSON (" + error.what() + "); export the bundle again");
  } catch (const BundleError& error) {
    const std::string message = error.what();
    throw BundleError(message.rfind("field ", 0) == 0 ? path + ": " + message : message);
  }
}

std::string to_json(const Session& session) {
  const Dims& dims = session.dims();
  json passed_over = json::object();
  for (const auto& [name, reason] : session.explain().passed_over) passed_over[name] = reason;
  const json all = {
      {"backend", name_of(session.backend())}, {"precision", name_of(session.precision())},
      {"chosen", session.explain().chosen},    {"passed_over", passed_over},
      {"inputs", tensors_of(session.inputs())}, {"outputs", tensors_of(session.outputs())},
      {"dims", {{"batch", range_of(dims.batch)}, {"x_len", range_of(dims.x_len)}, {"context_len", range_of(dims.context_len)}}}};
  return all.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace bca
