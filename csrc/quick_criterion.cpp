#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/matching.h"
#include "cpu/set_criterion.h"
#include "cpu/set_loss.h"
#include "quick_call.h"
#include "quick_calls.h"

namespace detr_fast {

namespace {

Element element_of(bool is_double) {
    return is_double ? Element::float64 : Element::float32;
}

// The items of a list or tuple; none of anything else.
struct Items {
    explicit Items(PyObject* sequence) {
        if (!PyList_CheckExact(sequence) && !PyTuple_Check(sequence)) return;
        count = PySequence_Fast_GET_SIZE(sequence);
        items = PySequence_Fast_ITEMS(sequence);
    }

    PyObject** items = nullptr;
    Py_ssize_t count = 0;
};

// L tensors of one shape and dtype that lie alike, the last dimension contiguous.
class Layers {
  public:
    bool read(PyObject* sequence) {
        const Items layers(sequence);
        for (Py_ssize_t l = 0; l < layers.count; ++l) {
            TensorView view;
            if (!view_of(layers.items[l], view) || view.dimensions != 3) return false;
            if (l == 0) {
                first_ = view;
                if (view.strides[2] != 1 || !(view.is_float(32) || view.is_float(64))) return false;
            } else if (!is_like_first(view)) {
                return false;
            }
            data_.push_back(view.data);
        }
        return layers.count > 0 && size(0) * size(1) * size(2) > 0;
    }

    int64_t count() const { return static_cast<int64_t>(data_.size()); }
    int64_t size(int dimension) const { return first_.shape[dimension]; }
    int64_t stride(int dimension) const { return first_.strides[dimension]; }
    bool is_double() const { return first_.is_float(64); }
    const void* const* data() const { return data_.data(); }

  private:
    bool is_like_first(const TensorView& view) const {
        return view.is_float(first_.dtype_bits) && std::equal(view.shape, view.shape + 3, first_.shape) &&
               std::equal(view.strides, view.strides + 3, first_.strides);
    }

    TensorView first_{};
    std::vector<const void*> data_;
};

// Predictions and packed targets, where they are as the native code wants them.
class Inputs {
  public:
    bool read(PyObject* logits, PyObject* boxes, PyObject* targets) {
        const Items packed(targets);
        return logits_.read(logits) && boxes_.read(boxes) && boxes_.count() == logits_.count() &&
               boxes_.size(0) == logits_.size(0) && boxes_.size(1) == logits_.size(1) && boxes_.size(2) == 4 &&
               boxes_.is_double() == logits_.is_double() && packed.count == 3 &&
               read_targets(packed.items[0], packed.items[1], packed.items[2]);
    }

    int64_t layers() const { return logits_.count(); }
    int64_t images() const { return logits_.size(0); }
    int64_t queries() const { return logits_.size(1); }
    int64_t classes() const { return logits_.size(2); }
    int64_t targets() const { return labels_.shape[0]; }
    bool is_double() const { return logits_.is_double(); }

    detr_fast_matching_inputs get() const {
        return {is_double(),
                layers(),
                images(),
                queries(),
                classes(),
                logits_.data(),
                boxes_.data(),
                nullptr,
                {logits_.stride(0), logits_.stride(1)},
                {boxes_.stride(0), boxes_.stride(1)},
                static_cast<const int64_t*>(labels_.data),
                target_boxes_.data,
                num_targets_.data()};
    }

  private:
    bool read_targets(PyObject* labels, PyObject* boxes, PyObject* counts) {
        if (!view_of(labels, labels_) || labels_.dimensions != 1 || !labels_.is_integer(64)) return false;
        if (!view_of(boxes, target_boxes_) || target_boxes_.dimensions != 2) return false;
        const int64_t all = labels_.shape[0];
        return is_contiguous(labels_) && is_contiguous(target_boxes_) && target_boxes_.shape[0] == all &&
               target_boxes_.shape[1] == 4 && target_boxes_.is_float(is_double() ? 64 : 32) && read(counts, all) &&
               labels_are_classes();
    }

    bool read(PyObject* counts, int64_t all) {
        const Items items(counts);
        for (Py_ssize_t b = 0; b < items.count; ++b) {
            const long long count = PyLong_CheckExact(items.items[b]) ? PyLong_AsLongLong(items.items[b]) : -1;
            PyErr_Clear();  // of a number that does not fit
            if (count < 0 || count > all) return false;
            num_targets_.push_back(count);
        }
        return items.count == images() && std::accumulate(num_targets_.begin(), num_targets_.end(), int64_t{0}) == all;
    }

    bool labels_are_classes() const {
        const auto* labels = static_cast<const int64_t*>(labels_.data);
        return std::all_of(labels, labels + targets(), [&](int64_t x) { return x >= 0 && x < classes(); });
    }

    Layers logits_, boxes_;
    TensorView labels_{}, target_boxes_{};
    std::vector<int64_t> num_targets_;
};

// Of a CostWeights; false where it holds other things than Python's own numbers.
bool read_weights(PyObject* tuple, detr_fast_cost_weights& weights) {
    const Items items(tuple);
    if (items.count != 6 || !PyBool_Check(items.items[3])) return false;
    double numbers[6];
    for (int i = 0; i < 6; ++i) {
        PyObject* item = items.items[i];
        if (!PyFloat_CheckExact(item) && !PyLong_Check(item)) return false;
        numbers[i] = PyFloat_AsDouble(item);
    }
    weights = {numbers[0], numbers[1], numbers[2], items.items[3] == Py_True, numbers[4], numbers[5]};
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();  // of an integer too large
    return false;
}

// One floating-point number in a tensor.
bool read_number(PyObject* tensor, double& number) {
    TensorView view;
    if (!view_of(tensor, view) ||
        !std::all_of(view.shape, view.shape + view.dimensions, [](int64_t n) { return n == 1; }))
        return false;
    if (view.is_float(32)) number = static_cast<double>(*static_cast<const float*>(view.data));
    if (view.is_float(64)) number = *static_cast<const double*>(view.data);
    return view.is_float(32) || view.is_float(64);
}

PyObject* matching(PyObject* const* arguments) {
    Results results;
    const int threads = results.failed() ? -1 : num_threads();
    if (threads < 0) return nullptr;
    Inputs inputs;
    detr_fast_cost_weights weights;
    if (!inputs.read(arguments[0], arguments[1], arguments[2]) || !read_weights(arguments[3], weights)) Py_RETURN_NONE;
    auto* query_of_target = static_cast<int64_t*>(results.add(Element::int64, {inputs.layers(), inputs.targets()}));
    auto* nonfinite = static_cast<int64_t*>(results.add(Element::int64, {inputs.layers(), inputs.images()}));
    {
        const ReleasedGil released(true);
        const auto in = inputs.get();
        detr_fast_matching_cpu(&in, &weights, query_of_target, nonfinite, threads);
    }
    return results.to_python();
}

// The gradients of a layer's losses, or where they would be.
detr_fast_set_losses add_losses(Results& results, const Inputs& inputs, bool with_slopes) {
    const Element element = element_of(inputs.is_double());
    const int64_t layers = inputs.layers();
    const int64_t images = with_slopes ? inputs.images() : 0;
    detr_fast_set_losses made{};
    made.losses = results.add(element, {3, layers});
    made.metrics = results.add(element, {2, layers});
    void* logit_slope = results.add(element, {layers, images, inputs.queries(), inputs.classes()});
    void* l1_slope = results.add(element, {layers, images, inputs.queries(), 4});
    void* giou_slope = results.add(element, {layers, images, inputs.queries(), 4});
    if (!with_slopes) return made;
    made.logit_slope = logit_slope;
    made.l1_slope = l1_slope;
    made.giou_slope = giou_slope;
    return made;
}

PyObject* criterion(PyObject* const* arguments) {
    Results results;
    const int threads = results.failed() ? -1 : num_threads();
    if (threads < 0) return nullptr;
    Inputs inputs;
    detr_fast_cost_weights weights;
    TensorView class_weight;
    double num_boxes = 0;
    if (!inputs.read(arguments[0], arguments[1], arguments[2]) || !read_weights(arguments[3], weights) ||
        !view_of(arguments[4], class_weight) || class_weight.dimensions != 1 || !is_contiguous(class_weight) ||
        class_weight.shape[0] != inputs.classes() || !class_weight.is_float(inputs.is_double() ? 64 : 32) ||
        !read_number(arguments[5], num_boxes)) {
        Py_RETURN_NONE;
    }
    const auto losses = add_losses(results, inputs, arguments[6] == Py_True);
    auto* query_of_target = static_cast<int64_t*>(results.add(Element::int64, {inputs.layers(), inputs.targets()}));
    auto* nonfinite = static_cast<int64_t*>(results.add(Element::int64, {inputs.layers(), inputs.images()}));
    {
        const ReleasedGil released(true);
        const auto in = inputs.get();
        const detr_fast_class_loss class_loss{detr_fast_cross_entropy, class_weight.data, 0, 0};
        const auto num_boxes_float = static_cast<float>(num_boxes);
        const void* normaliser = inputs.is_double() ? static_cast<const void*>(&num_boxes) : &num_boxes_float;
        detr_fast_set_criterion_cpu(&in, &weights, normaliser, &class_loss, query_of_target, nonfinite, &losses,
                                    threads);
    }
    return results.to_python();
}

// The gradients of 3L losses: one tensor, or a tuple with a tensor of one number for each, None being zero.
class Upstream {
  public:
    bool read(PyObject* object, int64_t count, int bits) {
        if (!PyTuple_CheckExact(object)) {
            TensorView all;
            data_ = view_of(object, all) && is_contiguous(all) && all.is_float(bits) && size(all) == count ? all.data
                                                                                                           : nullptr;
            return data_ != nullptr;
        }
        const Items numbers(object);
        if (numbers.count != count) return false;
        const size_t bytes = static_cast<size_t>(bits) / 8;
        copy_.resize(static_cast<size_t>(count) * bytes);
        for (Py_ssize_t i = 0; i < numbers.count; ++i) {
            if (numbers.items[i] == Py_None) continue;
            TensorView number;
            if (!view_of(numbers.items[i], number) || !number.is_float(bits) || size(number) != 1) return false;
            std::memcpy(copy_.data() + static_cast<size_t>(i) * bytes, number.data, bytes);
        }
        data_ = copy_.data();
        return true;
    }

    const void* data() const { return data_; }

  private:
    static int64_t size(const TensorView& view) {
        return std::accumulate(view.shape, view.shape + view.dimensions, int64_t{1}, std::multiplies<>());
    }

    std::vector<unsigned char> copy_;
    const void* data_ = nullptr;
};

PyObject* backward(PyObject* const* arguments) {
    TensorView slopes[3];
    for (int i = 0; i < 3; ++i) {
        TensorView& slope = slopes[i];
        if (!view_of(arguments[1 + i], slope) || slope.dimensions != 4 || !is_contiguous(slope) ||
            !slope.is_float(slopes[0].dtype_bits) || slope.shape[0] != slopes[0].shape[0]) {
            Py_RETURN_NONE;
        }
    }
    const bool is_double = slopes[0].is_float(64);
    const int64_t layers = slopes[0].shape[0];
    Upstream upstream;
    if (!(is_double || slopes[0].is_float(32)) || !upstream.read(arguments[0], 3 * layers, slopes[0].dtype_bits)) {
        Py_RETURN_NONE;
    }
    const int threads = num_threads();
    if (threads < 0) return nullptr;
    const auto elements = [](const TensorView& v) { return v.shape[1] * v.shape[2] * v.shape[3]; };
    const int64_t of_layer[2] = {elements(slopes[0]), elements(slopes[1])};
    if (elements(slopes[2]) != of_layer[1]) Py_RETURN_NONE;
    {
        const ReleasedGil released(true);
        const detr_fast_set_losses saved{nullptr, nullptr, slopes[0].data, slopes[1].data, slopes[2].data};
        detr_fast_set_loss_backward_cpu(is_double, of_layer, layers, upstream.data(), &saved, slopes[0].data,
                                        slopes[1].data, threads);
    }
    Py_RETURN_TRUE;
}

template <typename Call>
PyObject* with_exceptions(Py_ssize_t count, Py_ssize_t expected, const Call& call) {
    if (count != expected) Py_RETURN_NONE;
    try {
        return call();
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

}  // namespace

PyObject* quick_matching(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return with_exceptions(count, 4, [&] { return matching(arguments); });
}

PyObject* quick_criterion(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return with_exceptions(count, 7, [&] { return criterion(arguments); });
}

PyObject* quick_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return with_exceptions(count, 4, [&] { return backward(arguments); });
}

}  // namespace detr_fast
