#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

size_t shared_limit = 227 * 1024;

namespace {

constexpr size_t stack_bytes = 64 * 1024;
constexpr unsigned most_meetings = 1u << 20;  // of a warp in a block; a race can make a kernel go on for ever

struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    dim3 thread;
    bool finished = false;
};

struct Meeting {
    const char* what = nullptr;
    int arrived = 0;
    unsigned count = 0;              // of meetings that took place
    uint64_t brought[2][warp_size];  // two: a lane may come to the next meeting before others have read this one's
};

std::mt19937 shuffle(std::random_device{}());
std::vector<Lane> lanes;
std::vector<Meeting> meetings;  // of each warp
size_t arrived_in_block;
int missing_line = -1;
std::vector<size_t> ready;  // lanes that can go on
std::vector<int> rank;      // of each warp
ucontext_t scheduler;
size_t current;
const std::function<void()>* running_kernel;

[[noreturn]] void fail(const char* why, const char* what) {
    std::fprintf(stderr, "simt: %s (%s)\n", why, what);
    std::exit(3);
}

void enter_lane() {
    (*running_kernel)();
    lanes[current].finished = true;
    swapcontext(&lanes[current].context, &scheduler);
}

void start_lane(size_t index, dim3 thread) {
    Lane& lane = lanes[index];
    lane.thread = thread;
    lane.finished = false;
    ready.push_back(index);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = stack_bytes;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, enter_lane, 0);
}

void wait() {
    swapcontext(&lanes[current].context, &scheduler);
}

void wake(size_t first, size_t count) {
    for (size_t i = first; i < first + count; ++i) ready.push_back(i);
}

// From one barrier of the block to the next, warps are either equal or each goes as far as it can before a later one
// starts: where a warp has much to do until it meets others, a race shows only if some are far ahead.
void draw_ranks() {
    rank.assign(meetings.size(), 0);
    if (shuffle() % 2 == 0) return;
    std::iota(rank.begin(), rank.end(), 0);
    std::shuffle(rank.begin(), rank.end(), shuffle);
}

// Takes a lane of the first rank, from a random place on.
size_t take_ready_lane() {
    size_t first = std::uniform_int_distribution<size_t>(0, ready.size() - 1)(shuffle);
    for (size_t step = 1, from = first; step < ready.size(); ++step) {
        const size_t i = (from + step) % ready.size();
        if (rank[ready[i] / warp_size] < rank[ready[first] / warp_size]) first = i;
    }
    std::swap(ready[first], ready.back());
    const size_t taken = ready.back();
    ready.pop_back();
    return taken;
}

void run_block() {
    while (!ready.empty()) {
        current = take_ready_lane();
        threadIdx = lanes[current].thread;
        swapcontext(&scheduler, &lanes[current].context);
    }
    for (const Lane& lane : lanes) {
        if (!lane.finished) fail("a lane waits for one that has finished", meetings[0].what);
    }
}

}  // namespace

const uint64_t* meet(const char* what, uint64_t brought) {
    const size_t self = current;
    Meeting& meeting = meetings[self / warp_size];
    if (meeting.arrived > 0 && meeting.what != what) fail("lanes of a warp wait at different places", what);
    meeting.what = what;
    const unsigned buffer = meeting.count % 2;
    meeting.brought[buffer][self % warp_size] = brought;
    if (++meeting.arrived == warp_size) {
        meeting.arrived = 0;
        if (++meeting.count > most_meetings) fail("the kernel does not end", what);
        wake(self / warp_size * warp_size, warp_size);
    }
    wait();
    return meeting.brought[buffer];
}

// A warp whose lanes are at different places never completes: the lanes that wait then keep the block from ending.
void meet_block(int line) {
    if (line == missing_line) return;
    if (++arrived_in_block == lanes.size()) {
        arrived_in_block = 0;
        draw_ranks();
        wake(0, lanes.size());
    }
    wait();
}

int lane() {
    return static_cast<int>(current % warp_size);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    if (block.x % warp_size != 0 || block.y != 1 || block.z != 1 || grid.y != 1 || grid.z != 1) {
        fail("only whole warps in one dimension", "launch");
    }
    if (shared_bytes > shared_limit || shared_bytes > shared_capacity) fail("too much shared memory", "launch");
    gridDim = grid;
    blockDim = block;
    running_kernel = &kernel;
    if (lanes.size() != block.x) lanes = std::vector<Lane>(block.x);
    for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = dim3(b);
        meetings.assign(block.x / warp_size, Meeting{});
        arrived_in_block = 0;
        std::fill_n(shared_memory, shared_capacity, 0xff);
        draw_ranks();
        ready.clear();
        for (unsigned t = 0; t < block.x; ++t) start_lane(t, dim3(t));
        run_block();
    }
}

}  // namespace simt

extern "C" void simt_set_shared_limit(size_t bytes) {
    simt::shared_limit = bytes;
}
extern "C" void simt_set_seed(unsigned seed) {
    simt::shuffle.seed(seed);
}
extern "C" void simt_set_missing_barrier(int line) {
    simt::missing_line = line;
}
