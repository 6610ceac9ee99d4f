// The Python module detr_fast._C: a thin shell over the C launchers. Tensors come as addresses, so that no torch header
// is needed to build it, and one binary serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/add_layer_norm.h"
#include "cpu/assignment.h"
#include "cpu/mask_argmax.h"
#include "cpu/mask_loss.h"
#include "cpu/mask_threshold.h"
#include "cpu/memory_use.h"
#include "cpu/relu_dropout.h"
#include "cpu/widths.h"
#include "quick_calls.h"
#if defined(DETR_FAST_WITH_CUDA)
#include "cuda/assignment.h"
#endif

namespace py = pybind11;

void bind_attention(py::module_& m);           // bindings_attention.cpp
void bind_conv(py::module_& m);                // bindings_conv.cpp
void bind_conv_int8(py::module_& m);           // bindings_conv_int8.cpp
void bind_criterion(py::module_& m);           // bindings_criterion.cpp
void bind_transformer_layers(py::module_& m);  // bindings_transformer_layers.cpp

namespace {

using Triple = std::array<int64_t, 3>;
using Counts = std::vector<int64_t>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void solve_assignment_cpu(uintptr_t cost, bool is_double, const Triple& sizes, const Triple& strides,
                          const Counts& num_targets, bool by_auction, uintptr_t query_of_target, uintptr_t outcome,
                          uintptr_t dual_gap, int threads) {
    const py::gil_scoped_release release;
    detr_fast_assignment_cpu(at<const void>(cost), is_double, sizes.data(), strides.data(), num_targets.data(),
                             by_auction, at<int64_t>(query_of_target), at<int32_t>(outcome), at<double>(dual_gap),
                             threads);
}

// By shortest paths and without a report, which is what a training step calls. Returns the first problem that has
// another outcome than being solved, and that outcome; None where there is none.
py::object assignment_cpu(uintptr_t cost, bool is_double, const Triple& sizes, const Triple& strides,
                          const Counts& num_targets, uintptr_t query_of_target, int threads) {
    std::vector<int32_t> outcome(num_targets.size());
    {
        const py::gil_scoped_release release;
        detr_fast_assignment_cpu(at<const void>(cost), is_double, sizes.data(), strides.data(), num_targets.data(),
                                 false, at<int64_t>(query_of_target), outcome.data(), nullptr, threads);
    }
    for (size_t p = 0; p < outcome.size(); ++p) {
        if (outcome[p] != 0) return py::make_tuple(p, outcome[p]);
    }
    return py::none();
}

using Pair = std::array<int64_t, 2>;
using Rows = std::tuple<uintptr_t, int64_t, int32_t>;  // address, stride, dtype

detr_fast_rows rows_of(const Rows& rows) {
    return {at<const void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

struct AddLayerNormInputs {
    detr_fast_add_layer_norm inputs;

    AddLayerNormInputs(const Pair& sizes, const Rows& x, const Rows& residual, uintptr_t weight, uintptr_t seed,
                       int64_t threshold, double scale, bool is_double)
        : inputs{sizes[0],  sizes[1], rows_of(x), rows_of(residual), at<const void>(weight), at<const int64_t>(seed),
                 threshold, scale,    is_double} {}
};

void add_layer_norm_cpu(const AddLayerNormInputs& in, uintptr_t bias, double eps, const Rows& pos, int64_t pos_rows,
                        uintptr_t y, uintptr_t y_pos, int32_t y_dtype, uintptr_t mean, uintptr_t rstd, int threads) {
    const py::gil_scoped_release release;
    const detr_fast_add_layer_norm_outputs outputs{
        at<const void>(bias), eps,     rows_of(pos),   pos_rows,      at<void>(y),
        at<void>(y_pos),      y_dtype, at<void>(mean), at<void>(rstd)};
    detr_fast_add_layer_norm_cpu(&in.inputs, &outputs, threads);
}

void add_layer_norm_backward_cpu(const AddLayerNormInputs& in, const Rows& grad_y, const Rows& grad_y_pos,
                                 uintptr_t mean, uintptr_t rstd, uintptr_t grad_x, uintptr_t grad_residual,
                                 uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
    const py::gil_scoped_release release;
    const detr_fast_add_layer_norm_gradients gradients{
        rows_of(grad_y),  rows_of(grad_y_pos),     at<const void>(mean),  at<const void>(rstd),
        at<void>(grad_x), at<void>(grad_residual), at<void>(grad_weight), at<void>(grad_bias)};
    detr_fast_add_layer_norm_backward_cpu(&in.inputs, &gradients, threads);
}

void relu_dropout_cpu(const Pair& sizes, const Rows& x, uintptr_t seed, int64_t threshold, double scale, uintptr_t y,
                      int threads) {
    const py::gil_scoped_release release;
    const detr_fast_relu_dropout in{sizes[0], sizes[1], rows_of(x), at<const int64_t>(seed), threshold, scale};
    detr_fast_relu_dropout_cpu(&in, at<void>(y), threads);
}

void relu_dropout_backward_cpu(const Pair& sizes, const Rows& grad_y, const Rows& y, double scale, uintptr_t grad_x,
                               int threads) {
    const py::gil_scoped_release release;
    const detr_fast_relu_dropout in{sizes[0], sizes[1], rows_of(grad_y), nullptr, 0, scale};
    const detr_fast_rows output = rows_of(y);
    detr_fast_relu_dropout_backward_cpu(&in, &output, at<void>(grad_x), threads);
}

using Places = std::tuple<int64_t, uintptr_t, uintptr_t>;  // count, first, share

detr_fast_places places(const Places& p) {
    return {std::get<0>(p), at<const int32_t>(std::get<1>(p)), at<const float>(std::get<2>(p))};
}

void mask_argmax_cpu(uintptr_t masks, const Triple& sizes, const Places& rows, const Places& columns, uintptr_t index,
                     int threads) {
    const py::gil_scoped_release release;
    const auto of_rows = places(rows);
    const auto of_columns = places(columns);
    detr_fast_mask_argmax_cpu(at<const float>(masks), sizes.data(), &of_rows, &of_columns, at<int64_t>(index), threads);
}

void mask_threshold_cpu(uintptr_t masks, const Triple& sizes, const Places& rows, const Places& columns, float bound,
                        uintptr_t above, int threads) {
    const py::gil_scoped_release release;
    const auto of_rows = places(rows);
    const auto of_columns = places(columns);
    detr_fast_mask_threshold_cpu(at<const float>(masks), sizes.data(), &of_rows, &of_columns, bound, at<uint8_t>(above),
                                 threads);
}

using Image = std::array<int64_t, 4>;  // address, count, height and width of an image's masks

void mask_loss_cpu(uintptr_t logits, const Triple& sizes, const Pair& frame, const std::vector<Image>& images,
                   const std::array<uintptr_t, 2>& losses, const std::array<uintptr_t, 2>& gradients, int threads) {
    const py::gil_scoped_release release;
    std::vector<detr_fast_target_mask> targets;
    for (const auto& [address, count, height, width] : images) {
        const auto* pixels = at<const uint8_t>(static_cast<uintptr_t>(address));
        for (int64_t t = 0; t < count; ++t) targets.push_back({pixels + t * height * width, height, width});
    }
    const detr_fast_mask_loss in{sizes[0],      sizes[1], sizes[2], frame[0], frame[1], at<const float>(logits),
                                 targets.data()};
    const detr_fast_mask_losses out{at<float>(losses[0]), at<float>(losses[1]), at<float>(gradients[0]),
                                    at<float>(gradients[1])};
    detr_fast_mask_loss_cpu(&in, &out, threads);
}

#if defined(DETR_FAST_WITH_CUDA)

[[noreturn]] void raise_cuda_error(const char* op, int64_t error) {
    throw std::runtime_error(std::string(op) + ": CUDA says: " + detr_fast_cuda_error(static_cast<int>(error)));
}

int64_t assignment_cuda_workspace(bool is_double, const Triple& sizes, const Triple& strides, const Counts& num_targets,
                                  int device) {
    const int64_t bytes =
        detr_fast_assignment_cuda_workspace(is_double, sizes.data(), strides.data(), num_targets.data(), device);
    if (bytes < 0) raise_cuda_error("assignment", -bytes);
    return bytes;
}

void assignment_cuda(uintptr_t cost, bool is_double, const Triple& sizes, const Triple& strides,
                     const Counts& num_targets, uintptr_t query_of_target, uintptr_t outcome, uintptr_t dual_gap,
                     uintptr_t workspace, int device, uintptr_t stream) {
    int error = 0;
    {
        const py::gil_scoped_release release;
        error = detr_fast_assignment_cuda(at<const void>(cost), is_double, sizes.data(), strides.data(),
                                          num_targets.data(), at<int64_t>(query_of_target), at<int32_t>(outcome),
                                          at<double>(dual_gap), at<void>(workspace), device, at<void>(stream));
    }
    if (error != 0) raise_cuda_error("assignment", error);
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The native half of detr_fast.ops.";
    m.attr("compiler") = DETR_FAST_COMPILER;
    m.def("vector_bytes", &detr_fast::vector_bytes);
    m.def("limit_vector_bytes", &detr_fast::limit_vector_bytes);
    m.def("start_counting_memory", &detr_fast::MemoryUse::start);
    m.def("stop_counting_memory", &detr_fast::MemoryUse::stop);
    py::class_<AddLayerNormInputs>(m, "AddLayerNormInputs")
        .def(py::init<const Pair&, const Rows&, const Rows&, uintptr_t, uintptr_t, int64_t, double, bool>());
    m.def("add_layer_norm_cpu", &add_layer_norm_cpu);
    m.def("add_layer_norm_backward_cpu", &add_layer_norm_backward_cpu);
    m.def("relu_dropout_cpu", &relu_dropout_cpu);
    m.def("relu_dropout_backward_cpu", &relu_dropout_backward_cpu);
    m.def("assignment_cpu", &assignment_cpu);
    m.def("solve_assignment_cpu", &solve_assignment_cpu);
    m.def("make_quick_calls", [](const py::object& tensor_type, const py::object& exchange_capsule,
                                 const py::object& get_num_threads, const py::object& fills_memory) {
        PyObject* made = detr_fast::make_quick_calls(tensor_type.ptr(), exchange_capsule.ptr(), get_num_threads.ptr(),
                                                     fills_memory.ptr());
        if (made == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::dict>(made);
    });
    bind_attention(m);
    bind_conv(m);
    bind_conv_int8(m);
    bind_transformer_layers(m);
    bind_criterion(m);
    m.def("mask_argmax_cpu", &mask_argmax_cpu);
    m.def("mask_loss_cpu", &mask_loss_cpu);
    m.def("mask_threshold_cpu", &mask_threshold_cpu);
#if defined(DETR_FAST_WITH_CUDA)
    m.attr("cuda") = DETR_FAST_CUDA_VERSION;
    m.attr("cuda_architectures") = DETR_FAST_CUDA_ARCHITECTURES;
    m.def("assignment_cuda_workspace", &assignment_cuda_workspace);
    m.def("assignment_cuda", &assignment_cuda);
#else
    m.attr("cuda") = py::none();
    m.attr("cuda_architectures") = py::none();
#endif
}
