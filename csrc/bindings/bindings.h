// The functions that add an op's names to the module, one in each file.
#pragma once

#include "address.h"

void bind_isa(pybind11::module_& module);
void bind_directions(pybind11::module_& module);
void bind_directions_cuda(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_layers(pybind11::module_& module);
void bind_lora(pybind11::module_& module);
