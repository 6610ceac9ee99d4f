#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "quick_call.h"
#include "quick_calls.h"

namespace detr_fast {

namespace {

// One image's targets.
struct Image {
    TensorView labels;  // [T]
    TensorView boxes;   // [T, 4]

    int64_t count() const { return labels.shape[0]; }
};

bool read_image(PyObject* target, Image& image) {
    static PyObject* const labels = PyUnicode_InternFromString("labels");
    static PyObject* const boxes = PyUnicode_InternFromString("boxes");
    if (!PyDict_CheckExact(target) || labels == nullptr || boxes == nullptr) return false;
    PyObject* of_labels = PyDict_GetItemWithError(target, labels);
    PyObject* of_boxes = of_labels == nullptr ? nullptr : PyDict_GetItemWithError(target, boxes);
    if (of_boxes == nullptr || !view_of(of_labels, image.labels) || !view_of(of_boxes, image.boxes)) {
        PyErr_Clear();
        return false;
    }
    return image.labels.dimensions == 1 && image.labels.is_integer(64) && image.boxes.dimensions == 2 &&
           image.boxes.shape[0] == image.count() && image.boxes.shape[1] == 4 &&
           (image.boxes.is_float(32) || image.boxes.is_float(64));
}

bool copy_labels(const TensorView& from, int64_t num_classes, int64_t* to) {
    bool good = true;
    for (int64_t t = 0; t < from.shape[0]; ++t) {
        to[t] = static_cast<const int64_t*>(from.data)[t * from.strides[0]];
        good &= to[t] >= 0 && to[t] < num_classes;
    }
    return good;
}

// As _values_are_good in detr_fast/targets.py, where the tolerance has its reason. Not true of NaN.
template <typename Real>
bool is_inside(Real centre, Real size) {
    const Real tolerance = Real(1e-2);
    return size >= 0 && centre - size / 2 >= -tolerance && centre + size / 2 <= 1 + tolerance;
}

template <typename Real>
bool copy_boxes(const TensorView& from, Real* to) {
    bool good = true;
    for (int64_t t = 0; t < from.shape[0]; ++t, to += 4) {
        const Real* box = static_cast<const Real*>(from.data) + t * from.strides[0];
        for (int k = 0; k < 4; ++k) to[k] = box[k * from.strides[1]];
        good &= is_inside(to[0], to[2]) && is_inside(to[1], to[3]);
    }
    return good;
}

bool copy_all(const std::vector<Image>& images, int64_t num_classes, bool is_double, int64_t* labels, void* boxes) {
    int64_t first = 0;
    bool good = true;
    for (const Image& image : images) {
        good &= copy_labels(image.labels, num_classes, labels + first);
        good &= is_double ? copy_boxes(image.boxes, static_cast<double*>(boxes) + 4 * first)
                          : copy_boxes(image.boxes, static_cast<float*>(boxes) + 4 * first);
        first += image.count();
    }
    return good;
}

// Null with a Python exception set.
PyObject* counts_of(const std::vector<Image>& images) {
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(images.size()));
    for (size_t b = 0; list != nullptr && b < images.size(); ++b) {
        PyObject* count = PyLong_FromLongLong(images[b].count());
        if (count == nullptr) Py_CLEAR(list);
        if (list != nullptr) PyList_SET_ITEM(list, static_cast<Py_ssize_t>(b), count);
    }
    return list;
}

PyObject* pack(PyObject* targets, int64_t num_classes) {
    if (!PyList_Check(targets) || PyList_GET_SIZE(targets) == 0) Py_RETURN_NONE;
    Results results;  // first, because it runs Python, which might drop a tensor that is viewed
    if (results.failed()) return nullptr;
    std::vector<Image> images(static_cast<size_t>(PyList_GET_SIZE(targets)));
    int64_t all = 0;
    for (size_t b = 0; b < images.size(); ++b) {
        if (!read_image(PyList_GET_ITEM(targets, static_cast<Py_ssize_t>(b)), images[b])) Py_RETURN_NONE;
        if (images[b].boxes.dtype_bits != images[0].boxes.dtype_bits) Py_RETURN_NONE;
        all += images[b].count();
    }
    const bool is_double = images[0].boxes.is_float(64);
    auto* labels = static_cast<int64_t*>(results.add(Element::int64, {all}));
    void* boxes = results.add(is_double ? Element::float64 : Element::float32, {all, 4});
    if (!copy_all(images, num_classes, is_double, labels, boxes)) Py_RETURN_NONE;
    PyObject* counts = counts_of(images);
    return counts == nullptr ? nullptr : results.to_python(counts);
}

}  // namespace

PyObject* quick_pack(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 2 || !PyLong_CheckExact(arguments[1])) Py_RETURN_NONE;
    const long long num_classes = PyLong_AsLongLong(arguments[1]);
    if (num_classes < 0) {
        PyErr_Clear();  // of a number that does not fit
        Py_RETURN_NONE;
    }
    try {
        return pack(arguments[0], num_classes);
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

}  // namespace detr_fast
