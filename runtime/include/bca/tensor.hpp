// Tensors: what owns memory, and views of the caller's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bca/errors.hpp"

namespace bca {

/// Element types that a request may hold. Models take Float32, Float16, BFloat16 and Bool; the rest only with `cast`.
enum class DType : int {
  Float32 = 0, Float16, BFloat16, Float64, Bool, Int8, UInt8, Int16, UInt16, Int32, UInt32, Int64, UInt64
};

/// Where memory lies. Cuda is taken by the engine backends only.
enum class Memory : int { Cpu = 0, Cuda };

using Shape = std::vector<std::int64_t>;

BCA_API const char* name_of(DType dtype);           // as numpy writes it: "float32"
BCA_API DType dtype_of(const std::string& name);    // throws InputError
BCA_API std::size_t size_of(DType dtype);           // bytes of one element
BCA_API std::size_t count_of(const Shape& shape);   // elements; throws InputError where they overflow or one is negative

/// The element type of a C++ type.
template <typename T> struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = DType::Float32; };
template <> struct DTypeOf<double> { static constexpr DType value = DType::Float64; };
template <> struct DTypeOf<bool> { static constexpr DType value = DType::Bool; };
template <> struct DTypeOf<std::int32_t> { static constexpr DType value = DType::Int32; };
template <> struct DTypeOf<std::int64_t> { static constexpr DType value = DType::Int64; };

/// The caller's memory to read: C-contiguous, borrowed. It must stay as it is until the call returns; GPU memory with a stream
/// in RunOptions, until that stream has done the work.
struct View {
  const void* data = nullptr;
  DType dtype = DType::Float32;
  Shape shape;
  Memory memory = Memory::Cpu;

  View() = default;
  View(const void* at, DType type, Shape sizes, Memory where = Memory::Cpu)
      : data(at), dtype(type), shape(std::move(sizes)), memory(where) {}
  template <typename T>
  View(const T* at, Shape sizes, Memory where = Memory::Cpu) : View(at, DTypeOf<T>::value, std::move(sizes), where) {}
};

/// The caller's memory to write, on the same terms.
struct MutableView {
  void* data = nullptr;
  DType dtype = DType::Float32;
  Shape shape;
  Memory memory = Memory::Cpu;

  MutableView() = default;
  MutableView(void* at, DType type, Shape sizes, Memory where = Memory::Cpu)
      : data(at), dtype(type), shape(std::move(sizes)), memory(where) {}
  template <typename T>
  MutableView(T* at, Shape sizes, Memory where = Memory::Cpu)
      : MutableView(at, DTypeOf<T>::value, std::move(sizes), where) {}
};

/// A C-contiguous tensor that owns its memory, on the CPU, aligned to 64 bytes. Movable; copy with `clone`.
class BCA_API Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, Shape shape);                      // not initialised
  static Tensor zeros(DType dtype, Shape shape);
  Tensor clone() const;

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  std::size_t count() const { return count_; }           // elements
  std::size_t bytes() const { return count_ * size_of(dtype_); }
  void* data() { return data_.get(); }
  const void* data() const { return data_.get(); }

  /// The elements; throws InputError where T is not their type.
  template <typename T> T* data() {
    check(DTypeOf<T>::value);
    return static_cast<T*>(data());
  }
  template <typename T> const T* data() const {
    check(DTypeOf<T>::value);
    return static_cast<const T*>(data());
  }

  operator View() const { return {data(), dtype_, shape_}; }
  operator MutableView() { return {data(), dtype_, shape_}; }

 private:
  struct Free {
    void operator()(void* memory) const noexcept;
  };
  void check(DType wanted) const;

  DType dtype_ = DType::Float32;
  Shape shape_;
  std::size_t count_ = 0;
  std::unique_ptr<void, Free> data_;
};

/// By name. A vector, so that a name that is given twice is an error and not lost.
using Inputs = std::vector<std::pair<std::string, View>>;
using OutputViews = std::vector<std::pair<std::string, MutableView>>;
using Outputs = std::map<std::string, Tensor>;

}  // namespace bca
