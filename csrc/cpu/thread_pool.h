// Spreads independent problems over a few threads.
//
// Not OpenMP: torch brings its own runtime, and a second one in the process oversubscribes the cores and hangs after
// fork. Any number of callers may use the pool at once; the caller works too, so the pool helps and never blocks it.

#pragma once

#include <cstdint>
#include <functional>

namespace detr_fast {

// Calls task(i) for every i in [0, count) on at most `threads` threads, the caller's among them, and returns when all
// are done. The first exception that a task throws is thrown again here; tasks not yet begun are then left out.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace detr_fast
