// What quick calls share. A quick call is an op's usual call on the CPU from Python objects to Python objects: to look
// at a tensor from Python takes longer than many a problem. It returns None where a call is not usual, and leaves
// that, and all that is wrong with it, to the ordinary way.

#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "torch_tensors.h"

namespace detr_fast {

// What quick calls need of torch. One for the process: torch is loaded once.
struct Torch {
    PyObject* tensor_type;
    const TensorExchange* exchange;
    PyObject* get_num_threads;
    PyObject* fills_memory;  // a function: whether new tensors are to be filled with what nobody computes
};

extern Torch torch;

// Takes the class of tensors, that class's __dlpack_c_exchange_api__, and the two functions. Returns false, with a
// Python exception set, where torch's way of exchanging tensors is unknown.
bool set_torch(PyObject* tensor_type, PyObject* exchange_capsule, PyObject* get_num_threads, PyObject* fills_memory);

// Whether the object is a plain tensor on the CPU; sets no exception.
bool view_of(PyObject* object, TensorView& view);

// Rows one behind the other, of a tensor of one or two dimensions.
bool is_contiguous(const TensorView& view);

// Numbers that fit on the stack where they are few.
class Numbers {
  public:
    explicit Numbers(size_t count) : data_(few_) {
        if (count <= sizeof(few_) / sizeof(few_[0])) return;
        many_.resize(count);
        data_ = many_.data();
    }
    Numbers(const Numbers&) = delete;
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

// Returns the sum of a list's integers, -1 where one of them is none or is not in [0, most].
int64_t read_counts(PyObject* list, int64_t most, Numbers& counts);

// The number of threads to use; -1 with a Python exception set.
int num_threads();

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

struct ReleaseTensor {
    void operator()(OwnedTensor* tensor) const { tensor->release(tensor); }
};
using Result = std::unique_ptr<OwnedTensor, ReleaseTensor>;

// Results of a call, in the order in which they were made.
class Results {
  public:
    // Asks whether to fill new tensors. Where Python raises, failed() is true.
    Results();
    bool failed() const { return fill_ < 0; }

    // Returns where the elements lie. Throws std::bad_alloc.
    void* add(Element element, std::initializer_list<int64_t> shape);

    // A tuple of all of them as Python's tensors, and then of `last`, where there is one, whose reference it takes
    // over. Null with a Python exception set.
    PyObject* to_python(PyObject* last = nullptr);

  private:
    int fill_;
    std::vector<Result> tensors_;
};

}  // namespace detr_fast
