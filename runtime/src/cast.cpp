#include "cast.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "text.hpp"

namespace bca {
namespace {

bool is_float(DType dtype) {
  return dtype == DType::Float16 || dtype == DType::BFloat16 || dtype == DType::Float32 || dtype == DType::Float64;
}

template <typename T, typename Read> void read_all(const View& view, std::vector<double>& out, Read read) {
  const auto* at = static_cast<const unsigned char*>(view.data);
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, at + i * sizeof(T), sizeof(T));  // the caller's memory may be unaligned
    out[i] = read(value);
  }
}

template <typename T> double plain(T value) { return static_cast<double>(value); }

template <typename T> void store_as(std::int64_t value, void* at) {
  const T small = static_cast<T>(value);
  std::memcpy(at, &small, sizeof(T));
}

void store(double value, DType dtype, void* at) {
  const float single = static_cast<float>(value);
  const std::uint16_t bits = dtype == DType::Float16 ? half_of(value) : bfloat16_of(value);
  switch (dtype) {
    case DType::Float32: std::memcpy(at, &single, 4); break;
    case DType::Float64: std::memcpy(at, &value, 8); break;
    case DType::Bool: *static_cast<bool*>(at) = value != 0; break;
    case DType::Int32: store_as<std::int32_t>(static_cast<std::int64_t>(value), at); break;
    case DType::Int64: store_as<std::int64_t>(static_cast<std::int64_t>(value), at); break;
    default: std::memcpy(at, &bits, 2);
  }
}

/// The largest of the finite numbers that became infinite; 0 where none did.
double largest_lost(const std::vector<double>& values, const std::vector<double>& converted) {
  double found = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i]) && !std::isfinite(converted[i])) found = std::max(found, std::abs(values[i]));
  }
  return found;
}

bool is_integer(DType dtype) { return dtype > DType::Bool; }

void check_possible(const TensorInfo& input, const View& view, bool cast, bool is_mask) {
  const bool known = is_float(input.dtype) ? is_float(view.dtype) : is_integer(view.dtype) || is_mask || input.dtype == DType::Bool;
  const bool on_cpu = view.memory == Memory::Cpu;
  if (cast && known && on_cpu) return;
  const char* way_out = on_cpu ? "; cast=True converts it" : "; convert it on the GPU";
  throw InputError("input " + input.name + " has dtype " + name_of(view.dtype) + ", and needs " + name_of(input.dtype) +
                   (known ? way_out : ""));
}

void check_mask(const TensorInfo& input, const View& view, const std::vector<double>& values) {
  const auto other = std::find_if(values.begin(), values.end(), [](double value) { return value != 0 && value != 1; });
  if (other == values.end()) return;
  const bool whole = is_integer(view.dtype);
  throw InputError("input " + input.name + ": a mask of " + (whole ? "integers" : "numbers") + " must hold 0 and 1 alone, and it holds " +
                   (whole ? text::whole(*other) : text::number(*other)));
}

template <typename T> std::int64_t integer_at(const View& view, std::size_t index) {
  T value;
  std::memcpy(&value, static_cast<const unsigned char*>(view.data) + index * sizeof(T), sizeof(T));
  return static_cast<std::int64_t>(value);
}

std::int64_t integer_at(const View& view, std::size_t index) {
  switch (view.dtype) {
    case DType::Int8: return integer_at<std::int8_t>(view, index);
    case DType::UInt8: return integer_at<std::uint8_t>(view, index);
    case DType::Int16: return integer_at<std::int16_t>(view, index);
    case DType::UInt16: return integer_at<std::uint16_t>(view, index);
    case DType::Int32: return integer_at<std::int32_t>(view, index);
    case DType::UInt32: return integer_at<std::uint32_t>(view, index);
    default: return integer_at<std::int64_t>(view, index);
  }
}

/// Integers go by way of int64, as float64 does not hold them all; of uint64 the upper half shows as negative there.
Tensor cast_integers(const TensorInfo& input, const View& view) {
  Tensor made(input.dtype, view.shape);
  auto* at = static_cast<unsigned char*>(made.data());
  for (std::size_t i = 0; i < made.count(); ++i) {
    const std::int64_t value = integer_at(view, i);
    const bool wraps = view.dtype == DType::UInt64 && value < 0;
    if (wraps || (input.dtype == DType::Int32 && value != static_cast<std::int32_t>(value))) {
      const std::string shown = wraps ? std::to_string(static_cast<std::uint64_t>(value)) : std::to_string(value);
      throw InputError("input " + input.name + " holds " + shown + ", more than " + name_of(input.dtype) + " can");
    }
    if (input.dtype == DType::Int32) store_as<std::int32_t>(value, at + i * sizeof(std::int32_t));
    else store_as<std::int64_t>(value, at + i * sizeof(std::int64_t));
  }
  return made;
}

}  // namespace

Tensor filled(DType dtype, Shape shape, double value) {
  Tensor made(dtype, std::move(shape));
  unsigned char one[8];
  store(value, dtype, one);
  auto* at = static_cast<unsigned char*>(made.data());
  for (std::size_t i = 0; i < made.count(); ++i) std::memcpy(at + i * size_of(dtype), one, size_of(dtype));
  return made;
}

Tensor cast_to(const TensorInfo& input, const View& view, bool cast, bool is_mask) {
  check_possible(input, view, cast, is_mask);
  if (is_integer(input.dtype) && is_integer(view.dtype)) return cast_integers(input, view);
  const std::vector<double> values = as_doubles(view);
  if (!is_float(input.dtype)) check_mask(input, view, values);
  Tensor made(input.dtype, view.shape);
  auto* at = static_cast<unsigned char*>(made.data());
  for (std::size_t i = 0; i < values.size(); ++i) store(values[i], input.dtype, at + i * size_of(input.dtype));
  if (const double lost = largest_lost(values, as_doubles(made)); lost > 0) {
    throw InputError("input " + input.name + " holds " + text::number(lost) + ", more than " + name_of(input.dtype) + " can; scale it down");
  }
  return made;
}

std::vector<double> as_doubles(const View& view) {
  std::vector<double> out(count_of(view.shape));
  switch (view.dtype) {
    case DType::Float32: read_all<float>(view, out, plain<float>); break;
    case DType::Float16: read_all<std::uint16_t>(view, out, from_half); break;
    case DType::BFloat16: read_all<std::uint16_t>(view, out, from_bfloat16); break;
    case DType::Float64: read_all<double>(view, out, plain<double>); break;
    case DType::Bool:
    case DType::UInt8: read_all<std::uint8_t>(view, out, plain<std::uint8_t>); break;
    case DType::Int8: read_all<std::int8_t>(view, out, plain<std::int8_t>); break;
    case DType::Int16: read_all<std::int16_t>(view, out, plain<std::int16_t>); break;
    case DType::UInt16: read_all<std::uint16_t>(view, out, plain<std::uint16_t>); break;
    case DType::Int32: read_all<std::int32_t>(view, out, plain<std::int32_t>); break;
    case DType::UInt32: read_all<std::uint32_t>(view, out, plain<std::uint32_t>); break;
    case DType::Int64: read_all<std::int64_t>(view, out, plain<std::int64_t>); break;
    case DType::UInt64: read_all<std::uint64_t>(view, out, plain<std::uint64_t>); break;
  }
  return out;
}

std::uint16_t half_of(double value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::abs(value);
  if (std::isnan(size)) return sign | 0x7e00;
  if (size >= 65520) return sign | 0x7c00;  // half way between the largest number and what would come next
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<std::uint16_t>(sign | ((exponent + 14) * 1024 + mantissa));  // a carry moves on to the exponent
}

double from_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                     : std::ldexp(exponent ? 1024 + mantissa : mantissa, std::max(exponent, 1) - 25);
  return bits & 0x8000 ? -size : size;
}

std::uint16_t bfloat16_of(double value) {
  const auto single = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (std::isnan(single)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float single;
  std::memcpy(&single, &bits, 4);
  return static_cast<double>(single);
}

}  // namespace bca
