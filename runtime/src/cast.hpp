// Element types into each other, for `cast`, the self-test and the tools.
#pragma once

#include <vector>

#include "bca/session.hpp"

namespace bca {

/// Returns the input as the model takes it: other floating-point types, other integers, and masks of 0 and 1 (a bool is one).
/// `is_mask`: whether it is a mask, of integers too.
/// Throws InputError where `cast` is false, the types cannot be converted, or a number is more than the model's type can hold.
Tensor cast_to(const TensorInfo& input, const View& view, bool cast, bool is_mask = false);

/// A tensor of one value everywhere.
Tensor filled(DType dtype, Shape shape, double value);

/// The elements as float64, whatever their type.
std::vector<double> as_doubles(const View& view);

std::uint16_t half_of(double value);       // float16, rounded to nearest, ties to even
double from_half(std::uint16_t bits);
std::uint16_t bfloat16_of(double value);   // by way of float32, as ml_dtypes does
double from_bfloat16(std::uint16_t bits);

}  // namespace bca
