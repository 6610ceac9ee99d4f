// Spreads independent problems over a few threads.
//
// On the threads of the OpenMP runtime that torch brings, where it is found in the process. This module links against
// none: a second one would oversubscribe the cores and hang after fork. Else, and in a forked child, on threads of its
// own. Any number of callers may come at once; the caller works too, so that others help and never block it.

#pragma once

#include <cstdint>
#include <functional>

namespace detr_fast {

// Calls task(i) for every i in [0, count), neighbours on the same thread where it can, on at most `threads` threads,
// the caller's among them, and returns when all are done. The first exception that a task throws is thrown again here;
// tasks not yet begun are then left out.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace detr_fast
