// Enumerators from outside: C++ lets a caller put any number into them.
#pragma once

#include <string>
#include <vector>

#include "text.hpp"

namespace bca::enums {

// In the order of the enumerators.
inline constexpr const char* kTypes[] = {"float32", "float16", "bfloat16", "float64", "bool",  "int8",  "uint8",
                                         "int16",   "uint16",  "int32",    "uint32",  "int64", "uint64"};
inline constexpr const char* kMemories[] = {"cpu", "cuda"};
inline constexpr const char* kVerifies[] = {"full", "size", "off"};

template <typename Enum, std::size_t N> bool is_known(Enum value, const char* const (&)[N]) {
  return static_cast<int>(value) >= 0 && static_cast<int>(value) < static_cast<int>(N);
}

/// The name of an enumerator, by its number. Throws InputError for a number that has none.
template <typename Enum, std::size_t N> const char* name(const char* what, Enum value, const char* const (&names)[N]) {
  const auto number = static_cast<int>(value);
  if (is_known(value, names)) return names[number];
  std::vector<std::string> known;
  for (std::size_t i = 0; i < N; ++i) known.push_back(std::to_string(i) + " " + names[i]);
  throw InputError(std::string(what) + " is " + std::to_string(number) + "; allowed: " + text::join(known));
}

/// The enumerator of that name. Throws InputError with the nearest.
template <typename Enum, std::size_t N> Enum named(const char* what, const std::string& name, const char* const (&names)[N]) {
  const std::vector<std::string> known(names, names + N);
  for (std::size_t i = 0; i < N; ++i) {
    if (name == known[i]) return static_cast<Enum>(i);
  }
  throw InputError(std::string(what) + " " + text::quoted(name) + " is not known" + text::nearest(name, known) + "; allowed: " + text::join(known));
}

/// Of an input or an output, as `kind` says. Throws InputError that names it.
template <typename AnyView> void check(const char* kind, const std::string& tensor, const AnyView& view) {
  if (is_known(view.dtype, kTypes) && is_known(view.memory, kMemories)) return;  // no text is made for each call
  const std::string which = std::string(kind) + " " + tensor + ": its ";
  name((which + "element type").c_str(), view.dtype, kTypes);
  name((which + "memory").c_str(), view.memory, kMemories);
}

}  // namespace bca::enums
