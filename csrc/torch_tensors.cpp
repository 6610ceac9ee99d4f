#include "torch_tensors.h"

#include <cstddef>
#include <new>

namespace detr_fast {

namespace {

// The matrix in one piece of memory: what describes it, then its entries.
struct alignas(64) Matrix {
    OwnedTensor tensor;
    int64_t shape[2];
    int64_t strides[2];

    void* entries() { return this + 1; }
};

constexpr std::align_val_t alignment{alignof(Matrix)};

}  // namespace

const TensorExchange* TensorExchange::from_capsule(PyObject* capsule) {
    auto* exchange = static_cast<const TensorExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (exchange == nullptr) return nullptr;
    const bool fits = exchange->version.major == 1 && exchange->view != nullptr && exchange->to_python != nullptr;
    return fits ? exchange : nullptr;
}

OwnedTensor* new_matrix(int64_t rows, int64_t columns) {
    const size_t bytes = sizeof(Matrix) + static_cast<size_t>(rows * columns) * sizeof(int64_t);
    auto* matrix = new (::operator new(bytes, alignment)) Matrix{};
    matrix->shape[0] = rows;
    matrix->shape[1] = columns;
    matrix->strides[0] = columns;
    matrix->strides[1] = 1;
    OwnedTensor& tensor = matrix->tensor;
    tensor.version = {1, 0};
    tensor.context = matrix;
    tensor.release = [](OwnedTensor* self) { ::operator delete(self->context, alignment); };
    tensor.view = {matrix->entries(), TensorView::cpu, 0, 2, TensorView::signed_integer, 64, 1,
                   matrix->shape,     matrix->strides, 0};
    return &tensor;
}

}  // namespace detr_fast
