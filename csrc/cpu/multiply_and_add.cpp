#include "multiply_and_add.h"

#include <atomic>

#include "registers.h"
#include "thread_pool.h"
#include "widths.h"

namespace detr_fast {
namespace {

struct Chains {
    int64_t operations;

    template <int Bytes>
    float run() const {
        using Floats = typename Registers<Bytes>::Floats;
        // More than the 8 that two units of 4 cycles' latency keep busy, fewer than the registers there are.
        constexpr int chains = 12;
        const int64_t rounds = operations / (2 * chains * Registers<Bytes>::width) + 1;
        Floats sum[chains];
        unrolled<chains>([&](auto i) DETR_FAST_LAMBDA { sum[i] = Floats{} + static_cast<float>(i); });
        Floats a = Floats{} + 1e-9f, b = Floats{} + 1.0f;
        for (int64_t k = 0; k < rounds; ++k) {
#if defined(DETR_FAST_HAS_VECTORS) && defined(__x86_64__)
            asm volatile("" : "+v"(a), "+v"(b));  // or the compiler would multiply once
#endif
            unrolled<chains>([&](auto i) DETR_FAST_LAMBDA { sum[i] += a * b; });
        }
        Floats total{};
        unrolled<chains>([&](auto i) DETR_FAST_LAMBDA { total += sum[i]; });
        float first;
        std::memcpy(&first, &total, sizeof(first));
        return first;
    }
};

}  // namespace
}  // namespace detr_fast

float detr_fast_multiply_and_add_cpu(int64_t operations, int threads) {
    using namespace detr_fast;
    std::atomic<float> total{0.0f};
    parallel_for(threads, threads, [&](int64_t) { total = with_widest_vectors(Chains{operations / threads}); });
    return total;
}
