// What the CPU's ops share: compilation for several vector widths, scratch memory, and the solver itself.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "../core/lsap.h"
#include "memory_use.h"

// A function of loops that the compiler makes vectors of is compiled for each of these widths, and the loader picks
// one. (Where vectors are written out, see widths.h.) A sanitizer's runtime is not up yet when the loader does so.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__) && !defined(DETR_FAST_ONE_TARGET)
#define DETR_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define DETR_FAST_CLONES
#endif

namespace detr_fast {

// Memory that a thread keeps from problem to problem, unless it is much.
class Scratch {
  public:
    explicit Scratch(size_t largest_kept = size_t{4} << 20) : largest_kept_(largest_kept) {}

    unsigned char* reserve(size_t bytes) {
        if (bytes > capacity_) {
            memory_.reset();
            capacity_ = 0;
            memory_.reset(new unsigned char[bytes]);  // make_unique would fill it with zeros
            capacity_ = bytes;
        }
        use_.worked_in(bytes);
        return memory_.get();
    }

    void release_if_large() {
        if (capacity_ <= largest_kept_) return;
        use_.given_back();
        memory_.reset();
        capacity_ = 0;
    }

  private:
    std::unique_ptr<unsigned char[]> memory_;
    size_t capacity_ = 0, largest_kept_;
    KeptMemory use_;
};

// Where as many floats begin, on a line of the cache.
inline float* reserve_floats(Scratch& scratch, int64_t floats) {
    constexpr uintptr_t line = 64;
    unsigned char* const memory = scratch.reserve(static_cast<size_t>(floats) * sizeof(float) + line);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + line - 1) / line * line);
}

// Writes each target's query, -1 where there is none.
template <typename Cost>
void write_matching(const int32_t* column_of_row, const CostMatrix<Cost>& cost, bool rows_are_targets,
                    int64_t* query_of_target) {
    if (rows_are_targets) {
        std::copy_n(column_of_row, cost.rows, query_of_target);
        return;
    }
    std::fill_n(query_of_target, cost.columns, -1);
    for (int32_t i = 0; i < cost.rows; ++i) query_of_target[column_of_row[i]] = i;
}

// Bytes that solve() and solve_by_auction() work in.
size_t solver_memory(bool is_double, int64_t rows, int64_t columns);
size_t auction_memory(bool is_double, int64_t rows, int64_t columns);

// Write each target's query, and core/dual_gap.h where it is asked for, unless the outcome is another than `solved`.
Outcome solve(const CostMatrix<float>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
              double* gap = nullptr);
Outcome solve(const CostMatrix<double>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
              double* gap = nullptr);
Outcome solve_by_auction(const CostMatrix<float>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                         double* gap);
Outcome solve_by_auction(const CostMatrix<double>& cost, bool rows_are_targets, void* memory, int64_t* query_of_target,
                         double* gap);

}  // namespace detr_fast
