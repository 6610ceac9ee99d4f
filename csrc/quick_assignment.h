// The assignment's usual call on the CPU, from Python objects to a Python object: a small problem takes less time than
// to look at a tensor from Python.

#pragma once

#include <Python.h>

namespace detr_fast {

// The function quick_assignment(cost, num_targets) -> Tensor | None. None says that this is no usual call, or that it
// has no solution: the ordinary way then finds out what to do. Arguments: the class of tensors it takes, that class's
// __dlpack_c_exchange_api__, and the function that returns the number of threads to use.
// Returns null, with a Python exception set, where torch's way of exchanging tensors is unknown.
PyObject* make_quick_assignment(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads);

}  // namespace detr_fast
