// The part of the module detr_fast._C that is conv_int8's.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/conv_int8.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void conv_int8_cpu(const std::array<int64_t, 12>& s, uintptr_t x, uintptr_t packed, uintptr_t factor, uintptr_t bias,
                   uintptr_t residual, float residual_factor, bool is_float, bool relu, uintptr_t out, int instructions,
                   int threads) {
    const py::gil_scoped_release release;
    const detr_fast_conv shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]};
    const detr_fast_int8_result result{at<const float>(factor),
                                       at<const float>(bias),
                                       at<const uint8_t>(residual),
                                       residual_factor,
                                       is_float,
                                       relu,
                                       at<void>(out)};
    detr_fast_conv_int8_cpu(&shape, at<const uint8_t>(x), at<const int8_t>(packed), &result, instructions, threads);
}

void to_bytes_cpu(uintptr_t from, int64_t count, float factor, uintptr_t to, int threads) {
    const py::gil_scoped_release release;
    detr_fast_to_bytes_cpu(at<const float>(from), count, factor, at<uint8_t>(to), threads);
}

}  // namespace

void bind_conv_int8(py::module_& m) {
    m.def("conv_int8_cpu", &conv_int8_cpu);
    m.def("int8_instructions", &detr_fast_int8_instructions);
    m.def("to_bytes_cpu", &to_bytes_cpu);
}
