// The one file that knows of the JSON library: it takes longer to compile than all the others together.
#include "manifest.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "enums.hpp"
#include "text.hpp"

namespace bca {
namespace {

using json = nlohmann::ordered_json;  // the named dimensions have an order

constexpr int kFormat = 1;

// In the order of the enumerators; bundle/trust.py says the same.
constexpr const char* kTrusts[] = {"on-trust", "sample", "live-module"};
constexpr const char* kSaid[] = {
    "taken on trust: parity cannot see wrong heads or another forward pass; to prove it, export with a sample of your own "
    "code's inputs and outputs (--expect sample.npz), or the live module (bca_deploy.export)",
    "proven on a sample: gives what your own code gave",
    "proven on the live module: held against the code that runs it"};

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
  /// What is read of it where it is there; the default elsewhere.
  template <typename T, typename Read> T value_or(const std::string& key, T otherwise, Read read) const {
    return value_.is_object() && value_.contains(key) ? read((*this)[key]) : otherwise;
  }
  /// Refuses every other key.
  void only(const std::vector<std::string>& known) const {
    each([&](const std::string& key, const Field& item) {
      if (std::find(known.begin(), known.end(), key) == known.end()) item.fail("is unknown; allowed: " + text::join(known));
    });
  }
  std::string string(std::size_t least = 0) const {
    if (!value_.is_string()) fail("Input should be a valid string");
    auto found = value_.get<std::string>();
    if (found.size() < least) fail("String should have at least " + std::to_string(least) + " character");
    return found;
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
  double number() const {
    if (value_.is_boolean()) return value_.get<bool>() ? 1 : 0;
    if (!value_.is_number()) fail("Input should be a valid number");
    return value_.get<double>();
  }
  bool is_null() const { return value_.is_null(); }
  bool is_string() const { return value_.is_string(); }

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

/// As spec.py has it: the bare layer's interface names what the export may leave out.
std::map<std::string, std::string> read_left_out(const Field& field) {
  std::map<std::string, std::string> found;
  if (field.is_null()) return found;
  field.each([&](const std::string& name, const Field& item) {
    const bool word = item.is_string();
    if (word ? item.string() != "none" : item.boolean()) return;
    std::string flag = name;
    std::replace(flag.begin(), flag.end(), '_', '-');
    found[name] = (word ? "--" : "--[no-]") + flag;
  });
  return found;
}

Trust read_trust(const Field& field) {
  const std::string name = field.one_of({kTrusts, kTrusts + 3});
  return static_cast<Trust>(std::find(kTrusts, kTrusts + 3, name) - kTrusts);
}

DimRange read_range(const Field& field) {
  field.only({"min", "opt", "max"});
  const DimRange range{field["min"].integer(1), field["opt"].integer(1), field["max"].integer(1)};
  if (range.min > range.opt || range.opt > range.max) field.fail("needs 1 <= min <= opt <= max");
  return range;
}

Dims read_dims(const Field& field) {
  Dims dims;
  field.each([&](const std::string& name, const Field& range) { dims.emplace_back(name, read_range(range)); });
  return dims;
}

/// Those of a profile, in the signature's order: of every dimension, and of no other.
Dims read_profile(const Field& field, const Dims& dims) {
  Dims ranges;
  for (const auto& [name, range] : dims) ranges.emplace_back(name, read_range(field[name]));
  if (read_dims(field).size() != dims.size()) field.fail("has other dimensions than the signature's");
  return ranges;
}

Axis read_axis(const Field& field) {
  if (field.is_string()) return field.string();
  return field.integer(1);
}

std::optional<double> read_fill(const Field& field) {
  if (field.is_null()) return std::nullopt;
  return field.number();
}

TensorInfo read_tensor(const Field& field) {
  field.only({"name", "dtype", "axes", "fill"});
  return {field["name"].string(), dtype_of(field["dtype"].one_of({"float32", "float16", "bfloat16", "bool", "int32", "int64"})),
          field["axes"].list(read_axis), field.value_or("fill", std::optional<double>(), read_fill)};
}

std::string read_batch(const Field& field) { return field.is_null() ? "" : field.string(1); }

std::map<std::string, std::string> read_masks(const Field& field) {
  std::map<std::string, std::string> masks;
  field.each([&](const std::string& dim, const Field& name) { masks[dim] = name.string(); });
  return masks;
}

Signature read_signature(const Field& field) {
  field.only({"inputs", "outputs", "dims", "batch", "masks"});
  const Signature signature{field["inputs"].list(read_tensor, 1), field["outputs"].list(read_tensor, 1), read_dims(field["dims"]),
                            field.value_or("batch", std::string(), read_batch),
                            field.value_or("masks", std::map<std::string, std::string>(), read_masks)};
  if (const std::string fault = fault_of(signature); !fault.empty()) field.fail(fault);
  return signature;
}

ModelEntry read_model(const Field& field) {
  return {field["file"].string(), field["runtime"].one_of({"portable", "onnxruntime-cpu"}), read_precision(field["precision"]),
          field["keep_io_types"].boolean()};
}

EngineEntry read_engine(const Field& field, const Manifest& manifest) {
  EngineEntry entry{field["file"].string(), field["library"].one_of({"rtx", "tensorrt"}), field["version"].string(),
                    field["model"].string(), read_sha256(field["model_sha256"]), read_precision(field["precision"]), {}, {}, {}};
  entry.targets = field["targets"].list([](const Field& target) { return target.string(); });
  if (!field["gpu"].is_null()) entry.gpu_capability = field["gpu"]["compute_capability"].string();
  entry.profiles = field["profiles"].list([&](const Field& profile) { return read_profile(profile, manifest.signature.dims); }, 1);
  const Field options = field["options"];
  entry.version_compatible = options.value_or("version_compatible", false, [](const Field& given) { return given.boolean(); });
  entry.hardware_compatibility = options.value_or("hardware_compatibility", std::string("none"), [](const Field& given) {
    return given.one_of({"none", "ampere_plus", "same_compute_capability"});
  });
  const auto is_its = [&](const ModelEntry& model) { return model.file == entry.model; };
  if (std::none_of(manifest.models.begin(), manifest.models.end(), is_its)) {
    field.fail(entry.file + " was built from " + entry.model + ", which the bundle has not");
  }
  return entry;
}

void check_format(const json& content, const std::string& shown) {
  const auto format = content.is_object() ? content.find("format") : content.end();
  if (content.is_object() && format != content.end() && format->is_number() && format->get<double>() > kFormat) {
    throw BundleError(shown + " is a bundle of format " + format->dump() + ", newer than the formats this version reads (up to " +
                      std::to_string(kFormat) + "); upgrade bca_runtime");
  }
}

Manifest read_manifest(const Field& field) {
  if (field["format"].integer(0) != kFormat) field["format"].fail("Input should be 1");
  Manifest manifest;
  manifest.left_out = field.value_or("interface", std::map<std::string, std::string>(), read_left_out);
  manifest.trust = field.value_or("trust", Trust::OnTrust, read_trust);
  manifest.signature = read_signature(field["signature"]);
  manifest.models = field["models"].list(read_model, 1);
  manifest.engines = field["engines"].list([&](const Field& engine) { return read_engine(engine, manifest); });
  field["files"].each([&](const std::string& name, const Field& file) {
    file.only({"bytes", "sha256"});
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

json ranges_of(const Dims& dims) {
  json ranges = json::object();
  for (const auto& [name, range] : dims) ranges[name] = {{"min", range.min}, {"opt", range.opt}, {"max", range.max}};
  return ranges;
}

}  // namespace

Manifest parse_manifest(const std::string& text, const std::string& shown, const std::string& path) {
  try {
    // The JSON library passes over a byte order mark, which JSON has not and Python refuses.
    if (text.rfind("\xef\xbb\xbf", 0) == 0) throw BundleError(path + " is not JSON (it begins with a byte order mark); export the bundle again");
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

Signature signature_of(const Manifest& manifest, const ModelEntry& model) {
  constexpr DType kTypes[] = {DType::Float32, DType::Float16, DType::BFloat16};
  return of_floats(manifest.signature, model.keep_io_types ? DType::Float32 : kTypes[static_cast<int>(model.precision)]);
}

Signature signature_of(const Manifest& manifest, const EngineEntry& engine) {
  for (const ModelEntry& model : manifest.models) {
    if (model.file != engine.model) continue;
    Signature signature = signature_of(manifest, model);
    signature.dims = hull(engine.profiles);
    return signature;
  }
  throw BundleError(engine.file + " was built from " + engine.model + ", which the bundle has not; build it again with bca build");
}

const char* name_of(Trust trust) { return enums::name("trust", trust, kTrusts); }

std::string to_json(const Session& session) {
  json passed_over = json::object();
  for (const auto& [name, reason] : session.explain().passed_over) passed_over[name] = reason;
  const json all = {
      {"trust", name_of(session.trust())},     {"trust_said", kSaid[static_cast<int>(session.trust())]},
      {"backend", name_of(session.backend())}, {"precision", name_of(session.precision())},
      {"chosen", session.explain().chosen},    {"passed_over", passed_over},
      {"inputs", tensors_of(session.inputs())}, {"outputs", tensors_of(session.outputs())},
      {"dims", ranges_of(session.dims())}};
  return all.dump(2, ' ', false, json::error_handler_t::replace);
}

}  // namespace bca
