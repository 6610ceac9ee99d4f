// The part of the module detr_fast._C that matches predictions with targets and computes their losses.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/matching.h"
#include "cpu/matching_cost.h"
#include "cpu/set_criterion.h"
#include "cpu/set_loss.h"
#if defined(DETR_FAST_WITH_CUDA)
#include "cuda/assignment.h"
#include "cuda/matching.h"
#endif

namespace py = pybind11;

namespace {

using Counts = std::vector<int64_t>;
using Triple = std::array<int64_t, 3>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Addresses = std::vector<uintptr_t>;
using Pair = std::array<int64_t, 2>;

// Keyword arguments of Python become the launchers' structs.
struct MatchingInputs {
    bool is_double;
    std::array<int64_t, 4> sizes;    // L, B, Q, classes
    Addresses logits, boxes, extra;  // extra may be empty
    Pair logit_strides, box_strides;
    uintptr_t labels, target_boxes;
    Counts num_targets;
    std::array<double, 5> weights;  // class, bbox, giou, alpha, gamma
    bool focal;

    detr_fast_matching_inputs inputs() const {
        const auto list = [](const Addresses& a) { return reinterpret_cast<const void* const*>(a.data()); };
        return {is_double,
                sizes[0],
                sizes[1],
                sizes[2],
                sizes[3],
                list(logits),
                list(boxes),
                extra.empty() ? nullptr : list(extra),
                {logit_strides[0], logit_strides[1]},
                {box_strides[0], box_strides[1]},
                at<const int64_t>(labels),
                at<const void>(target_boxes),
                num_targets.data()};
    }

    detr_fast_cost_weights cost_weights() const {
        return {weights[0], weights[1], weights[2], focal, weights[3], weights[4]};
    }
};

// Labels are offsets into a query's logits.
void check_labels(const MatchingInputs& m) {
    const auto* labels = at<const int64_t>(m.labels);
    const int64_t classes = m.sizes[3];
    const int64_t count = std::accumulate(m.num_targets.begin(), m.num_targets.end(), int64_t{0});
    for (int64_t n = 0; n < count; ++n) {
        if (labels[n] >= 0 && labels[n] < classes) continue;
        throw py::index_error("labels must be in [0, " + std::to_string(classes - 1) +
                              "], the places of a query's logits, got " + std::to_string(labels[n]));
    }
}

void matching_cost_cpu(const MatchingInputs& m, uintptr_t cost, uintptr_t nonfinite, int threads) {
    check_labels(m);
    const py::gil_scoped_release release;
    const auto inputs = m.inputs();
    const auto weights = m.cost_weights();
    detr_fast_matching_cost_cpu(&inputs, &weights, at<void>(cost), at<int64_t>(nonfinite), threads);
}

void matching_cpu(const MatchingInputs& m, uintptr_t query_of_target, uintptr_t nonfinite, int threads) {
    check_labels(m);
    const py::gil_scoped_release release;
    const auto inputs = m.inputs();
    const auto weights = m.cost_weights();
    detr_fast_matching_cpu(&inputs, &weights, at<int64_t>(query_of_target), at<int64_t>(nonfinite), threads);
}

using FiveAddresses = std::array<uintptr_t, 5>;

detr_fast_set_losses set_losses(const FiveAddresses& a) {
    return {at<void>(a[0]), at<void>(a[1]), at<void>(a[2]), at<void>(a[3]), at<void>(a[4])};
}

// What a class loss is, as numbers: its kind, the weights' address, alpha, gamma.
using ClassLoss = std::tuple<int, uintptr_t, double, double>;

detr_fast_class_loss class_loss_of(const ClassLoss& c) {
    return {static_cast<detr_fast_class_loss_kind>(std::get<0>(c)), at<const void>(std::get<1>(c)), std::get<2>(c),
            std::get<3>(c)};
}

// results: losses, metrics, and slopes of logits, L1 and GIoU, or zeros for these.
void set_loss_cpu(const MatchingInputs& m, uintptr_t query_of_target, uintptr_t num_boxes, const ClassLoss& kind,
                  const FiveAddresses& results, int threads) {
    check_labels(m);
    const py::gil_scoped_release release;
    const auto inputs = m.inputs();
    const auto class_loss = class_loss_of(kind);
    const auto written = set_losses(results);
    detr_fast_set_loss_cpu(&inputs, at<const int64_t>(query_of_target), at<const void>(num_boxes), &class_loss,
                           &written, threads);
}

void set_criterion_cpu(const MatchingInputs& m, uintptr_t num_boxes, const ClassLoss& kind, uintptr_t query_of_target,
                       uintptr_t nonfinite, const FiveAddresses& results, int threads) {
    check_labels(m);
    const py::gil_scoped_release release;
    const auto inputs = m.inputs();
    const auto weights = m.cost_weights();
    const auto class_loss = class_loss_of(kind);
    const auto written = set_losses(results);
    detr_fast_set_criterion_cpu(&inputs, &weights, at<const void>(num_boxes), &class_loss, at<int64_t>(query_of_target),
                                at<int64_t>(nonfinite), &written, threads);
}

// elements: of a layer's logits and of its boxes. saved: as above, without losses and metrics.
void set_loss_backward_cpu(bool is_double, const Pair& elements, int64_t layers, uintptr_t upstream,
                           const Triple& saved, uintptr_t logit_gradient, uintptr_t box_gradient, int threads) {
    const py::gil_scoped_release release;
    const auto address = [&](int i) { return static_cast<uintptr_t>(saved[i]); };
    const auto slopes = set_losses({0, 0, address(0), address(1), address(2)});
    detr_fast_set_loss_backward_cpu(is_double, elements.data(), layers, at<const void>(upstream), &slopes,
                                    at<void>(logit_gradient), at<void>(box_gradient), threads);
}

#if defined(DETR_FAST_WITH_CUDA)

[[noreturn]] void raise_cuda_error(int64_t error) {
    throw std::runtime_error(std::string("matching: CUDA says: ") + detr_fast_cuda_error(static_cast<int>(error)));
}

int64_t matching_cuda_workspace(const MatchingInputs& m, int device) {
    const auto inputs = m.inputs();
    const int64_t bytes = detr_fast_matching_cuda_workspace(&inputs, device);
    if (bytes < 0) raise_cuda_error(-bytes);
    return bytes;
}

// dtypes of logits, boxes, target boxes and extra costs, as in enum detr_fast_dtype. padded: address of the offsets, or
// 0, and the room for targets.
void matching_cuda(const MatchingInputs& m, const std::array<int32_t, 4>& dtypes,
                   const std::pair<uintptr_t, int64_t>& padded, uintptr_t query_of_target, uintptr_t nonfinite,
                   uintptr_t workspace, int device, uintptr_t stream) {
    int error = 0;
    {
        const py::gil_scoped_release release;
        const auto inputs = m.inputs();
        const auto weights = m.cost_weights();
        const detr_fast_matching_dtypes as_stored{dtypes[0], dtypes[1], dtypes[2], dtypes[3]};
        const detr_fast_padded_targets targets{at<const int64_t>(padded.first), padded.second};
        error = detr_fast_matching_cuda(&inputs, &as_stored, &weights, &targets, at<int64_t>(query_of_target),
                                        at<int64_t>(nonfinite), at<void>(workspace), device, at<void>(stream));
    }
    if (error != 0) raise_cuda_error(error);
}

#endif

}  // namespace

void bind_criterion(py::module_& m) {
    py::class_<MatchingInputs>(m, "MatchingInputs")
        .def(py::init([](bool is_double, const std::array<int64_t, 4>& sizes, Addresses logits, Addresses boxes,
                         Addresses extra, Pair logit_strides, Pair box_strides, uintptr_t labels,
                         uintptr_t target_boxes, Counts num_targets, const std::array<double, 5>& weights, bool focal) {
            return MatchingInputs{
                is_double,   sizes,  std::move(logits), std::move(boxes),       std::move(extra), logit_strides,
                box_strides, labels, target_boxes,      std::move(num_targets), weights,          focal};
        }));
    m.def("matching_cost_cpu", &matching_cost_cpu);
    m.def("matching_cpu", &matching_cpu);
    m.def("set_loss_cpu", &set_loss_cpu);
    m.def("set_loss_backward_cpu", &set_loss_backward_cpu);
    m.def("set_criterion_cpu", &set_criterion_cpu);
#if defined(DETR_FAST_WITH_CUDA)
    m.def("matching_cuda_workspace", &matching_cuda_workspace);
    m.def("matching_cuda", &matching_cuda);
#endif
}
