// Bytes that this module takes for itself, which torch's allocator knows nothing of: counted while somebody asks.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace detr_fast {

class MemoryUse {
  public:
    static void start() {
        held_ = 0;
        peak_ = 0;
        count_ = ++counts_;
    }

    // The most bytes that were held at once since start(), over what was held then.
    static int64_t stop() {
        count_ = 0;
        return peak_;
    }

    // Which count is going on; 0 where none is.
    static uint64_t count() { return count_.load(std::memory_order_relaxed); }

    // Taken where it is positive, given back where it is negative. Nothing but a load while no count is going on.
    static void add(int64_t bytes) {
        if (count() == 0) return;
        const int64_t held = held_ += bytes;
        int64_t peak = peak_;
        while (held > peak && !peak_.compare_exchange_weak(peak, held)) {
        }
    }

  private:
    inline static std::atomic<int64_t> held_{0}, peak_{0};
    inline static std::atomic<uint64_t> count_{0}, counts_{0};
};

// Memory that stays with a thread from call to call: in each count it is taken when it is first worked in.
class KeptMemory {
  public:
    void worked_in(size_t bytes) {
        const uint64_t count = MemoryUse::count();
        if (count == 0) return;
        if (count != count_) bytes_ = 0;
        count_ = count;
        if (bytes <= bytes_) return;
        MemoryUse::add(static_cast<int64_t>(bytes - bytes_));
        bytes_ = bytes;
    }

    void given_back() {
        if (count_ != 0 && count_ == MemoryUse::count()) MemoryUse::add(-static_cast<int64_t>(bytes_));
        bytes_ = 0;
    }

  private:
    uint64_t count_ = 0;
    size_t bytes_ = 0;
};

// Memory of one call.
class CallMemory {
  public:
    explicit CallMemory(size_t bytes) : bytes_(static_cast<int64_t>(bytes)) { MemoryUse::add(bytes_); }
    ~CallMemory() { MemoryUse::add(-bytes_); }
    CallMemory(const CallMemory&) = delete;
    CallMemory& operator=(const CallMemory&) = delete;

  private:
    int64_t bytes_;
};

}  // namespace detr_fast
