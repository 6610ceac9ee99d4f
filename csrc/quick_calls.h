// The quick calls (see quick_call.h), as Python's METH_FASTCALL functions.

#pragma once

#include <Python.h>

namespace detr_fast {

// (cost, num_targets) -> query_of_target, None also where there is no solution
PyObject* quick_assignment(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// (targets, num_classes) -> (labels [N], boxes [N, 4], counts), the tensors of dicts one behind the other; None also
// where a label or a box is not as detr_fast/targets.py wants it
PyObject* quick_pack(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// (logits, boxes, targets, weights) -> (query_of_target, num_nonfinite)
PyObject* quick_matching(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// (logits, boxes, targets, weights, class_weight, num_boxes, with_slopes) ->
// (losses, metrics, logit_slope, l1_slope, giou_slope, query_of_target, num_nonfinite)
PyObject* quick_criterion(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// (upstream, logit_slope, l1_slope, giou_slope) -> True: logit_slope and l1_slope are the gradients now. upstream is
// one tensor, or a tuple of single numbers in its order, None being zero.
PyObject* quick_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// A dict of all of them; null with a Python exception set. Arguments as of set_torch.
PyObject* make_quick_calls(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads,
                           PyObject* fills_memory);

}  // namespace detr_fast
