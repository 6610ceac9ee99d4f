// The Python module detr_fast._C: a thin shell over the C launchers. Tensors come as addresses, so that no torch header
// is needed to build it, and one binary serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/assignment.h"
#if defined(DETR_FAST_WITH_CUDA)
#include "cuda/assignment.h"
#endif

namespace py = pybind11;

namespace {

using Triple = std::array<int64_t, 3>;
using Counts = std::vector<int64_t>;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Returns the outcome of every problem.
std::vector<int32_t> assignment_cpu(uintptr_t cost, bool is_double, const Triple& sizes, const Triple& strides,
                                    const Counts& num_targets, uintptr_t query_of_target, int threads) {
    std::vector<int32_t> outcome(num_targets.size());
    const py::gil_scoped_release release;
    detr_fast_assignment_cpu(at<const void>(cost), is_double, sizes.data(), strides.data(), num_targets.data(),
                             at<int64_t>(query_of_target), outcome.data(), threads);
    return outcome;
}

#if defined(DETR_FAST_WITH_CUDA)

[[noreturn]] void raise_cuda_error(int64_t error) {
    throw std::runtime_error(std::string("assignment: CUDA says: ") + detr_fast_cuda_error(static_cast<int>(error)));
}

int64_t assignment_cuda_workspace(bool is_double, const Triple& sizes, const Triple& strides, const Counts& num_targets,
                                  int device) {
    const int64_t bytes =
        detr_fast_assignment_cuda_workspace(is_double, sizes.data(), strides.data(), num_targets.data(), device);
    if (bytes < 0) raise_cuda_error(-bytes);
    return bytes;
}

void assignment_cuda(uintptr_t cost, bool is_double, const Triple& sizes, const Triple& strides,
                     const Counts& num_targets, uintptr_t query_of_target, uintptr_t outcome, uintptr_t workspace,
                     int device, uintptr_t stream) {
    int error = 0;
    {
        const py::gil_scoped_release release;
        error = detr_fast_assignment_cuda(at<const void>(cost), is_double, sizes.data(), strides.data(),
                                          num_targets.data(), at<int64_t>(query_of_target), at<int32_t>(outcome),
                                          at<void>(workspace), device, at<void>(stream));
    }
    if (error != 0) raise_cuda_error(error);
}

#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The native half of detr_fast.ops.";
    m.attr("compiler") = DETR_FAST_COMPILER;
    m.def("assignment_cpu", &assignment_cpu);
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
