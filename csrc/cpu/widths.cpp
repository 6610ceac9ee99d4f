#include "widths.h"

#include <algorithm>
#include <atomic>

namespace detr_fast {
namespace {

int widest() {
#if defined(DETR_FAST_MANY_TARGETS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 64;
    if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
    return ordinary_vector_bytes;
}

std::atomic<int>& in_use() {
    static std::atomic<int> bytes{widest()};
    return bytes;
}

}  // namespace

int vector_bytes() {
    return in_use().load(std::memory_order_relaxed);
}

int limit_vector_bytes(int bytes) {
    const int allowed = bytes >= 64 ? 64 : bytes >= 32 ? 32 : ordinary_vector_bytes;
    in_use() = std::min(allowed, widest());
    return vector_bytes();
}

}  // namespace detr_fast
