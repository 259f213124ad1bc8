// The errors that the runtime throws on purpose. A message says what, what it got, what is allowed and what to do.
#pragma once

#include <stdexcept>

#define BCA_API __attribute__((visibility("default")))

namespace bca {

/// Root of every error below.
class BCA_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An input, output or option that cannot be used. Nothing was run.
class BCA_API InputError : public Error {
 public:
  using Error::Error;
};

/// A bundle that is missing, damaged, unsafe or of a newer format.
class BCA_API BundleError : public Error {
 public:
  using Error::Error;
};

/// The backend asked for does not work here, or a run failed on it. No output of a failed run may be used.
class BCA_API EngineError : public Error {
 public:
  using Error::Error;
};

/// A library that is opened at run time is not there; the message names what was looked for.
class BCA_API MissingDependencyError : public Error {
 public:
  using Error::Error;
};

/// The self-test's outputs are out of bounds.
class BCA_API ParityError : public Error {
 public:
  using Error::Error;
};

}  // namespace bca
