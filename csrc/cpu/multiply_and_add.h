// What a processor can do at most, for benchmarks: multiplications and additions of registers.

#pragma once

#include <cstdint>

#if defined(__cplusplus)
extern "C" {
#endif

// Performs at least `operations` multiplications and additions of floats, divided among the threads. Returns a number
// that hangs on all of them.
float detr_fast_multiply_and_add_cpu(int64_t operations, int threads);

#if defined(__cplusplus)
}
#endif
