#include "bca/tensor.hpp"

#include <cstring>
#include <limits>
#include <new>

#include "text.hpp"

namespace bca {
namespace {

struct Kind {
  const char* name;
  std::size_t bytes;
};

// In the order of DType.
constexpr Kind kKinds[] = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"float64", 8}, {"bool", 1},
                           {"int8", 1},    {"uint8", 1},   {"int16", 2},    {"uint16", 2},  {"int32", 4},
                           {"uint32", 4},  {"int64", 8},   {"uint64", 8}};
constexpr std::align_val_t kAlignment{64};

}  // namespace

const char* name_of(DType dtype) { return kKinds[static_cast<int>(dtype)].name; }

std::size_t size_of(DType dtype) { return kKinds[static_cast<int>(dtype)].bytes; }

DType dtype_of(const std::string& name) {
  std::vector<std::string> known;
  for (const Kind& kind : kKinds) {
    if (name == kind.name) return static_cast<DType>(&kind - kKinds);
    known.emplace_back(kind.name);
  }
  throw InputError("element type '" + name + "' is not known" + text::nearest(name, known) + "; allowed: " + text::join(known));
}

std::size_t count_of(const Shape& shape) {
  constexpr std::size_t kLimit = std::numeric_limits<std::size_t>::max() / 16;  // so that bytes do not overflow either
  std::size_t count = 1;
  for (std::int64_t size : shape) {
    if (size < 0) throw InputError("shape " + text::shown(shape) + " has a negative size");
    const auto factor = static_cast<std::size_t>(size);
    if (factor != 0 && count > kLimit / factor) throw InputError("shape " + text::shown(shape) + " is more than memory can hold");
    count *= factor;
  }
  return count;
}

void Tensor::Free::operator()(void* memory) const noexcept { ::operator delete(memory, kAlignment); }

Tensor::Tensor(DType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)), count_(count_of(shape_)) {
  data_.reset(::operator new(bytes() == 0 ? 1 : bytes(), kAlignment));
}

Tensor Tensor::zeros(DType dtype, Shape shape) {
  Tensor made(dtype, std::move(shape));
  std::memset(made.data(), 0, made.bytes());
  return made;
}

Tensor Tensor::clone() const {
  Tensor made(dtype_, shape_);
  if (data_) std::memcpy(made.data(), data(), bytes());
  return made;
}

void Tensor::check(DType wanted) const {
  if (dtype_ != wanted) {
    throw InputError(std::string("the tensor holds ") + name_of(dtype_) + ", not " + name_of(wanted) + "; ask for its own type");
  }
}

}  // namespace bca
