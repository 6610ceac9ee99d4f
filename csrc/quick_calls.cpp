#include "quick_calls.h"

#include "quick_call.h"

namespace detr_fast {

namespace {

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Function function) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method("assignment", quick_assignment), method("pack", quick_pack),
                         method("matching", quick_matching), method("criterion", quick_criterion),
                         method("backward", quick_backward)};

}  // namespace

PyObject* make_quick_calls(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads,
                           PyObject* fills_memory) {
    if (!set_torch(tensor_type, exchange_capsule, get_num_threads, fills_memory)) return nullptr;
    PyObject* calls = PyDict_New();
    for (PyMethodDef& each : methods) {
        PyObject* function = calls == nullptr ? nullptr : PyCFunction_New(&each, nullptr);
        if (function == nullptr || PyDict_SetItemString(calls, each.ml_name, function) != 0) Py_CLEAR(calls);
        Py_XDECREF(function);
    }
    return calls;
}

}  // namespace detr_fast
