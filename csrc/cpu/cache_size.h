// How large the processor's caches are.

#pragma once

#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace detr_fast {

// Bytes of a core's second cache, 1 MB where the system does not say.
inline int64_t second_cache_bytes() {
    static const int64_t bytes = []() -> int64_t {
#if defined(_SC_LEVEL2_CACHE_SIZE)
        if (const long known = sysconf(_SC_LEVEL2_CACHE_SIZE); known > 0) return known;
#endif
        return int64_t{1} << 20;
    }();
    return bytes;
}

}  // namespace detr_fast
