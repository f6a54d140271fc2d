// What the bindings share. Addresses and streams come from Python as integers, tables as addresses
// of rows (table.h). The Python functions have checked shapes, dtypes and lengths. Long work runs
// without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>

#include <array>
#include <string>

namespace mezo {

template <class T>
T* address(const char* function, const char* what, int64_t value, int64_t size) {
  if (size < 0) {
    throw pybind11::value_error(std::string(function) + ": the size of " + what +
                                " must be >= 0, got " + std::to_string(size) +
                                "; pass its row count.");
  }
  if (value == 0 && size > 0) {
    throw pybind11::value_error(std::string(function) + ": " + what +
                                " must be an address, got 0 for " + std::to_string(size) +
                                " rows; pass data_ptr() of the table.");
  }
  return reinterpret_cast<T*>(value);
}

}  // namespace mezo
