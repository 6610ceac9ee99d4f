#include "quick_assignment.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/assignment.h"
#include "torch_tensors.h"

namespace detr_fast {

namespace {

// What quick_assignment needs of torch. One for the process: torch is loaded once.
struct Torch {
    PyObject* tensor_type;
    const TensorExchange* exchange;
    PyObject* get_num_threads;
};

Torch torch;

// Below this many costs other Python threads would wait longer for their turn than for the result.
constexpr int64_t costs_worth_releasing_the_gil = 1 << 12;

// Numbers that fit on the stack where they are few.
class Numbers {
  public:
    explicit Numbers(size_t count) : data_(few_) {
        if (count <= sizeof(few_) / sizeof(few_[0])) return;
        many_.resize(count);
        data_ = many_.data();
    }
    int64_t& operator[](size_t i) { return data_[i]; }
    const int64_t* data() const { return data_; }
    template <typename T>
    T* as() {
        return reinterpret_cast<T*>(data_);
    }

  private:
    int64_t few_[64];
    std::vector<int64_t> many_;
    int64_t* data_;
};

bool is_usual(PyObject* cost, PyObject* num_targets, TensorView& view) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(cost)) != torch.tensor_type || !PyList_CheckExact(num_targets))
        return false;
    if (torch.exchange->view(cost, &view) != 0) {
        PyErr_Clear();  // torch cannot tell where it lies; the ordinary way says why
        return false;
    }
    return view.is_on_cpu() && (view.is_float(32) || view.is_float(64)) && view.dimensions == 3 &&
           view.strides != nullptr && view.shape[0] == PyList_GET_SIZE(num_targets);
}

// Returns how many targets there are, -1 where a count is not an integer in [0, most].
int64_t read_counts(PyObject* num_targets, int64_t most, Numbers& counts) {
    int64_t sum = 0;
    for (Py_ssize_t p = 0; p < PyList_GET_SIZE(num_targets); ++p) {
        PyObject* item = PyList_GET_ITEM(num_targets, p);
        if (!PyLong_CheckExact(item)) return -1;
        const long long count = PyLong_AsLongLong(item);
        if (count < 0 || count > most) {
            PyErr_Clear();  // of a number that does not fit
            return -1;
        }
        counts[static_cast<size_t>(p)] = count;
        sum += count;
    }
    return sum;
}

struct Release {
    void operator()(OwnedTensor* tensor) const { tensor->release(tensor); }
};

// Returns -1 with a Python exception set.
int threads_for(int64_t costs) {
    if (detr_fast_assignment_cpu_threads(costs) <= 1) return 1;
    PyObject* threads = PyObject_CallNoArgs(torch.get_num_threads);
    if (threads == nullptr) return -1;
    const long number = PyLong_AsLong(threads);
    Py_DECREF(threads);
    return static_cast<int>(number);
}

// Lets other Python threads run while it exists.
class ReleasedGil {
  public:
    explicit ReleasedGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
    ReleasedGil(const ReleasedGil&) = delete;
    ~ReleasedGil() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }

  private:
    PyThreadState* state_;
};

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
    const int threads = threads_for(costs);
    if (threads < 0) return nullptr;
    std::unique_ptr<OwnedTensor, Release> result(new_matrix(cost.shape[0], cost.shape[2]));
    if (!solve_all(cost, counts, costs, threads, static_cast<int64_t*>(result->view.data))) Py_RETURN_NONE;
    void* object = nullptr;
    return torch.exchange->to_python(result.release(), &object) == 0 ? static_cast<PyObject*>(object) : nullptr;
}

PyObject* quick_assignment(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2) Py_RETURN_NONE;
    try {
        return solve(arguments[0], arguments[1]);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

PyMethodDef method = {"quick_assignment", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(quick_assignment)),
                      METH_FASTCALL, nullptr};

}  // namespace

PyObject* make_quick_assignment(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads) {
    const TensorExchange* exchange = TensorExchange::from_capsule(exchange_capsule);
    if (exchange == nullptr) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_NotImplementedError, "torch exchanges tensors in an unknown way");
        return nullptr;
    }
    Py_INCREF(tensor_type);
    Py_INCREF(get_num_threads);
    torch = {tensor_type, exchange, get_num_threads};
    return PyCFunction_New(&method, nullptr);
}

}  // namespace detr_fast
