#include "bca/tensor.hpp"

#include <cstring>
#include <limits>
#include <new>

#include "enums.hpp"

namespace bca {
namespace {

// In the order of DType.
constexpr std::size_t kBytes[] = {4, 2, 2, 8, 1, 1, 1, 2, 2, 4, 4, 8, 8};
constexpr std::align_val_t kAlignment{64};

}  // namespace

const char* name_of(DType dtype) { return enums::name("element type", dtype, enums::kTypes); }

std::size_t size_of(DType dtype) {
  name_of(dtype);
  return kBytes[static_cast<int>(dtype)];
}

DType dtype_of(const std::string& name) { return enums::named<DType>("element type", name, enums::kTypes); }

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
