// The one exception type of the core. Every message says what was wrong, where, what was
// expected and found, and what to do; bindings turn the kind into a Python exception.
// Assertions are for our own mistakes only and never see user input.
#pragma once

#include <stdexcept>
#include <string>

namespace coreinfer {

enum class ErrorKind {
  kValue,      // an argument is out of its range            -> ValueError
  kGguf,       // a model file is malformed or unsupported    -> GGUFError(ValueError)
  kIo,         // the operating system refused                -> OSError
  kState,      // the call does not fit the object's state    -> RuntimeError
  kNumeric,    // NaN or Inf where a number was needed        -> ArithmeticError
  kMemory,     // a limit cannot be met, or no memory is left -> MemoryError
  kCancelled,  // stopped on request                          -> KeyboardInterrupt is re-raised
};

// Visible everywhere: it is thrown out of the CUDA library and caught here.
class __attribute__((visibility("default"))) Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// printf-style construction: throw_error(ErrorKind::kValue, "alpha is %g, expected (0, 1]", a).
[[noreturn]] void throw_error(ErrorKind kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// The same text without throwing.
std::string format_string(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace coreinfer
