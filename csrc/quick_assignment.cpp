#include <algorithm>
#include <cstdint>
#include <new>

#include "cpu/assignment.h"
#include "quick_call.h"
#include "quick_calls.h"

namespace detr_fast {

namespace {

// Below this many costs other Python threads would wait longer for their turn than for the result.
constexpr int64_t costs_worth_releasing_the_gil = 1 << 12;

bool is_usual(PyObject* cost, PyObject* num_targets, TensorView& view) {
    return PyList_CheckExact(num_targets) && view_of(cost, view) && (view.is_float(32) || view.is_float(64)) &&
           view.dimensions == 3 && view.shape[0] == PyList_GET_SIZE(num_targets);
}

bool solve_all(const TensorView& cost, const Numbers& counts, int64_t costs, int threads, int64_t* query_of_target) {
    const auto problems = static_cast<size_t>(cost.shape[0]);
    Numbers outcomes((problems + 1) / 2);
    const ReleasedGil released(costs >= costs_worth_releasing_the_gil);
    detr_fast_assignment_cpu(cost.data, cost.dtype_bits == 64, cost.shape, cost.strides, counts.data(), false,
                             query_of_target, outcomes.as<int32_t>(), nullptr, threads);
    const int32_t* outcome = outcomes.as<int32_t>();
    return std::all_of(outcome, outcome + problems, [](int32_t o) { return o == 0; });
}

PyObject* solve(PyObject* cost_tensor, PyObject* num_targets) {
    TensorView cost;
    if (!is_usual(cost_tensor, num_targets, cost)) Py_RETURN_NONE;
    Numbers counts(static_cast<size_t>(cost.shape[0]));
    const int64_t targets = read_counts(num_targets, cost.shape[2], counts);
    if (targets < 0) Py_RETURN_NONE;
    const int64_t costs = targets * cost.shape[1];
    const int threads = detr_fast_assignment_cpu_threads(costs) <= 1 ? 1 : num_threads();
    if (threads < 0) return nullptr;
    Result result(new_tensor(Element::int64, {cost.shape[0], cost.shape[2]}));
    if (!solve_all(cost, counts, costs, threads, static_cast<int64_t*>(result->view.data))) Py_RETURN_NONE;
    void* object = nullptr;
    return torch.exchange->to_python(result.release(), &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

}  // namespace

PyObject* quick_assignment(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2) Py_RETURN_NONE;
    try {
        return solve(arguments[0], arguments[1]);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

}  // namespace detr_fast
