// Compiles a task for several widths of vectors, and runs the widest that the processor has.

#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(DETR_FAST_ONE_TARGET)
#define DETR_FAST_MANY_TARGETS 1
#endif

namespace detr_fast {

// What the compiler may use without being told more.
#if defined(__AVX512F__)
constexpr int ordinary_vector_bytes = 64;
#elif defined(__AVX__)
constexpr int ordinary_vector_bytes = 32;
#else
constexpr int ordinary_vector_bytes = 16;
#endif

constexpr int widest_vector_bytes = 64;

// Bytes of the vectors that tasks run with: 64 (AVX-512), 32 (AVX2) or 16.
int vector_bytes();

// Lets tasks use no wider vectors than these from now on, which tests do. Returns what vector_bytes() now is.
int limit_vector_bytes(int bytes);

#if defined(DETR_FAST_MANY_TARGETS)
template <typename Task>
__attribute__((target("arch=x86-64-v4"), flatten, noinline)) auto run_with_avx512(const Task& task) {
    return task.template run<64>();
}

template <typename Task>
__attribute__((target("arch=x86-64-v3"), flatten, noinline)) auto run_with_avx2(const Task& task) {
    return task.template run<32>();
}
#endif

// Calls task.run<Bytes>(), with everything that it calls compiled for vectors of `Bytes` bytes.
template <typename Task>
auto with_widest_vectors(const Task& task) {
#if defined(DETR_FAST_MANY_TARGETS)
    if (vector_bytes() == 64) return run_with_avx512(task);
    if (vector_bytes() == 32) return run_with_avx2(task);
#endif
    return task.template run<ordinary_vector_bytes>();
}

}  // namespace detr_fast
