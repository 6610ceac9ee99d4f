#include "torch_tensors.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <new>

#include "result_memory.h"

namespace detr_fast {

namespace {

// A tensor in one piece of memory: what describes it, then its elements.
struct alignas(64) TensorInOnePiece {
    OwnedTensor tensor;
    int64_t shape[4];
    int64_t strides[4];
    size_t bytes;  // of the piece

    void* elements() { return this + 1; }
};

void release(OwnedTensor* tensor) {
    auto* whole = static_cast<TensorInOnePiece*>(tensor->context);
    give_back_memory({whole, whole->bytes});
}

}  // namespace

const TensorExchange* TensorExchange::from_capsule(PyObject* capsule) {
    auto* exchange = static_cast<const TensorExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (exchange == nullptr) return nullptr;
    const bool fits = exchange->version.major == 1 && exchange->view != nullptr && exchange->to_python != nullptr;
    return fits ? exchange : nullptr;
}

OwnedTensor* new_tensor(Element element, std::initializer_list<int64_t> shape) {
    const uint8_t element_bytes = element == Element::float32 ? 4 : 8;
    size_t bytes = element_bytes;
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    const Piece piece = take_memory(sizeof(TensorInOnePiece) + bytes);
    auto* whole = new (piece.memory) TensorInOnePiece{};
    whole->bytes = piece.bytes;
    std::copy(shape.begin(), shape.end(), whole->shape);
    const auto dimensions = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int32_t d = dimensions - 1; d >= 0; --d) {
        whole->strides[d] = stride;
        stride *= whole->shape[d];
    }
    const uint8_t code = element == Element::int64 ? TensorView::signed_integer : TensorView::floating_point;
    const auto bits = static_cast<uint8_t>(8 * element_bytes);
    OwnedTensor& tensor = whole->tensor;
    tensor.version = {1, 0};
    tensor.context = whole;
    tensor.release = release;
    tensor.view = {whole->elements(), TensorView::cpu, 0, dimensions, code, bits, 1, whole->shape, whole->strides, 0};
    return &tensor;
}

}  // namespace detr_fast
