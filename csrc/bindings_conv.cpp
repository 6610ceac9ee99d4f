// The part of the module detr_fast._C that is convolution's, and the peak that benchmarks measure it against.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/conv.h"
#include "cpu/conv_max_pool.h"
#include "cpu/multiply_and_add.h"
#include "cpu/winograd.h"

namespace py = pybind11;

namespace {

using Sizes = std::array<int64_t, 12>;  // in the order of detr_fast_conv

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

detr_fast_conv shape_of(const Sizes& s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]};
}

int64_t conv_packed_floats(const Sizes& sizes) {
    const auto shape = shape_of(sizes);
    return detr_fast_conv_packed_floats(&shape);
}

void conv_pack(const Sizes& sizes, uintptr_t weight, uintptr_t scale, bool adjoint, uintptr_t packed, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    const detr_fast_conv_weight from{at<const float>(weight), at<const float>(scale), adjoint};
    detr_fast_conv_pack(&shape, &from, at<float>(packed), threads);
}

void conv_cpu(const Sizes& sizes, uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, uintptr_t gate,
              bool relu, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_conv_cpu(&shape, at<const float>(x), at<const float>(packed), at<const float>(bias),
                       at<const float>(residual), at<const float>(gate), relu, at<float>(out), threads);
}

void conv_max_pool_cpu(const Sizes& sizes, uintptr_t x, const std::array<int64_t, 4>& strides, uintptr_t packed,
                       uintptr_t bias, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_conv_max_pool_cpu(&shape, at<const float>(x), strides.data(), at<const float>(packed),
                                at<const float>(bias), at<float>(out), threads);
}

void winograd_cpu(const Sizes& sizes, uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t residual, uintptr_t gate,
                  bool relu, uintptr_t out, int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_winograd_cpu(&shape, at<const float>(x), at<const float>(packed), at<const float>(bias),
                           at<const float>(residual), at<const float>(gate), relu, at<float>(out), threads);
}

void winograd_weight_gradient_cpu(const Sizes& sizes, uintptr_t x, uintptr_t grad, uintptr_t scale, uintptr_t of_weight,
                                  int threads) {
    const py::gil_scoped_release release;
    const auto shape = shape_of(sizes);
    detr_fast_winograd_weight_gradient_cpu(&shape, at<const float>(x), at<const float>(grad), at<const float>(scale),
                                           at<float>(of_weight), threads);
}

}  // namespace

void bind_conv(py::module_& m) {
    m.def("conv_packed_floats", &conv_packed_floats);
    m.def("conv_pack", &conv_pack);
    m.def("conv_cpu", &conv_cpu);
    m.def("conv_max_pool_cpu", &conv_max_pool_cpu);
    m.def("multiply_and_add_cpu", &detr_fast_multiply_and_add_cpu, py::call_guard<py::gil_scoped_release>());
    m.def("winograd_cpu", &winograd_cpu);
    m.def("winograd_weight_gradient_cpu", &winograd_weight_gradient_cpu);
}
