#include "quick_call.h"

#include <cstring>

namespace detr_fast {

Torch torch;

bool set_torch(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads, PyObject* fills_memory) {
    const TensorExchange* exchange = TensorExchange::from_capsule(exchange_capsule);
    if (exchange == nullptr) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_NotImplementedError, "torch exchanges tensors in an unknown way");
        return false;
    }
    for (PyObject* kept : {tensor_type, get_num_threads, fills_memory}) Py_INCREF(kept);
    torch = {tensor_type, exchange, get_num_threads, fills_memory};
    return true;
}

bool view_of(PyObject* object, TensorView& view) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch.tensor_type) return false;
    if (torch.exchange->view(object, &view) != 0) {
        PyErr_Clear();  // torch cannot tell where it lies; the ordinary way says why
        return false;
    }
    return view.is_on_cpu() && (view.dimensions == 0 || view.strides != nullptr);
}

bool is_contiguous(const TensorView& view) {
    int64_t stride = 1;
    for (int32_t d = view.dimensions - 1; d >= 0; --d) {
        if (view.shape[d] != 1 && view.strides[d] != stride) return false;
        stride *= view.shape[d];
    }
    return true;
}

int64_t read_counts(PyObject* list, int64_t most, Numbers& counts) {
    int64_t sum = 0;
    for (Py_ssize_t p = 0; p < PyList_GET_SIZE(list); ++p) {
        PyObject* item = PyList_GET_ITEM(list, p);
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

int num_threads() {
    PyObject* threads = PyObject_CallNoArgs(torch.get_num_threads);
    if (threads == nullptr) return -1;
    const long number = PyLong_AsLong(threads);
    Py_DECREF(threads);
    return static_cast<int>(number);
}

Results::Results() : fill_(-1) {
    PyObject* fills = PyObject_CallNoArgs(torch.fills_memory);
    if (fills == nullptr) return;
    fill_ = PyObject_IsTrue(fills);
    Py_DECREF(fills);
}

void* Results::add(Element element, std::initializer_list<int64_t> shape) {
    tensors_.emplace_back(new_tensor(element, shape));
    const TensorView& view = tensors_.back()->view;
    if (fill_ > 0) {
        size_t bytes = view.dtype_bits / 8;
        for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
        std::memset(view.data, element == Element::int64 ? 0x7f : 0xff, bytes);  // a very large number, NaN
    }
    return view.data;
}

PyObject* Results::to_python(PyObject* last) {
    const auto count = static_cast<Py_ssize_t>(tensors_.size());
    PyObject* tuple = PyTuple_New(count + (last == nullptr ? 0 : 1));
    for (Py_ssize_t i = 0; tuple != nullptr && i < count; ++i) {
        void* object = nullptr;
        if (torch.exchange->to_python(tensors_[static_cast<size_t>(i)].release(), &object) != 0) Py_CLEAR(tuple);
        if (tuple != nullptr) PyTuple_SET_ITEM(tuple, i, static_cast<PyObject*>(object));
    }
    if (tuple == nullptr) {
        Py_XDECREF(last);
    } else if (last != nullptr) {
        PyTuple_SET_ITEM(tuple, count, last);
    }
    return tuple;
}

}  // namespace detr_fast
