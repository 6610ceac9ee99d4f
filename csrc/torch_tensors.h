// Tensors of torch read and made from C, in a tenth of the time that the same takes from Python. torch hands out
// functions for it in the capsule torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.3; torch 2.13 has it, 2.6 has not).
// The types below are DLPack's, whose layout is fixed (https://dmlc.github.io/dlpack/latest/c_api.html), so that no
// header is needed.

#pragma once

#include <Python.h>

#include <cstdint>
#include <initializer_list>

namespace detr_fast {

struct DlpackVersion {
    uint32_t major, minor;
};

struct TensorView {
    static constexpr int32_t cpu = 1;
    static constexpr uint8_t signed_integer = 0, floating_point = 2;

    void* data;
    int32_t device_type, device_index;
    int32_t dimensions;
    uint8_t dtype_code, dtype_bits;
    uint16_t dtype_lanes;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;

    bool is_on_cpu() const { return device_type == cpu && byte_offset == 0; }
    bool is_integer(int bits) const { return dtype_code == signed_integer && dtype_bits == bits && dtype_lanes == 1; }
    bool is_float(int bits) const { return dtype_code == floating_point && dtype_bits == bits && dtype_lanes == 1; }
};

struct OwnedTensor {
    DlpackVersion version;
    void* context;
    void (*release)(OwnedTensor* self);
    uint64_t flags;
    TensorView view;
};

// What torch hands out. Functions return 0, or another number with a Python exception set.
struct TensorExchange {
    DlpackVersion version;
    TensorExchange* older;
    void* make_tensor;
    void* own_tensor;
    int (*to_python)(OwnedTensor* tensor, void** object);  // takes the tensor, whether it succeeds or not
    int (*view)(void* object, TensorView* view);
    void* current_stream;

    // From torch.Tensor's capsule. Returns null where its version has another layout, or no view().
    static const TensorExchange* from_capsule(PyObject* capsule);
};

// Of the elements of a new tensor.
enum class Element { float32, float64, int64 };

// A tensor of at most four dimensions on the CPU with memory of its own, not filled. Throws std::bad_alloc.
OwnedTensor* new_tensor(Element element, std::initializer_list<int64_t> shape);

}  // namespace detr_fast
