#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#if defined(_WIN32)
#include <process.h>
#define DETR_FAST_GETPID _getpid
#else
#include <unistd.h>
#define DETR_FAST_GETPID getpid
#endif

namespace detr_fast {
namespace {

class Job {
  public:
    Job(int64_t count, const std::function<void(int64_t)>& task) : count_(count), task_(task) {}

    void work() {
        for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
            try {
                task_(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
                next_.store(count_);
            }
        }
    }

    void enter() { helpers_.fetch_add(1); }

    void leave() {
        const std::lock_guard<std::mutex> lock(mutex_);
        helpers_.fetch_sub(1);
        left_.notify_all();
    }

    void wait_for_helpers() {
        std::unique_lock<std::mutex> lock(mutex_);
        left_.wait(lock, [this] { return helpers_.load() == 0; });
        // Moved, so that the caller alone holds it: a helper may be the last to let go of the job.
        if (error_) std::rethrow_exception(std::move(error_));
    }

  private:
    const int64_t count_;
    const std::function<void(int64_t)>& task_;
    std::atomic<int64_t> next_{0};
    std::atomic<int> helpers_{0};
    std::mutex mutex_;
    std::condition_variable left_;
    std::exception_ptr error_;
};

class Pool {
  public:
    // Threads do not survive fork, and a lock may have been held by one of them, so a child starts with a new pool.
    // Pools are never destroyed: their threads may still wait when the process ends.
    static Pool& instance() {
        static std::atomic<Pool*> current{nullptr};
        Pool* pool = current.load();
        const auto pid = DETR_FAST_GETPID();
        if (pool != nullptr && pool->pid_ == pid) return *pool;
        auto fresh = std::make_unique<Pool>(pid);
        if (current.compare_exchange_strong(pool, fresh.get())) return *fresh.release();
        return *pool;
    }

    explicit Pool(int pid) : pid_(pid) {}

    // Asks `helpers` threads to join the job. Tickets that no thread took are taken back by withdraw().
    void post(const std::shared_ptr<Job>& job, int helpers) {
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            for (; threads_ < helpers; ++threads_) std::thread(&Pool::serve, this).detach();
        } catch (const std::system_error&) {
            // The system has no more threads to give: those there are, or the caller alone, do the work.
        }
        for (int i = 0; i < helpers; ++i) tickets_.push_back(job);
        posted_.notify_all();
    }

    void withdraw(const std::shared_ptr<Job>& job) {
        const std::lock_guard<std::mutex> lock(mutex_);
        tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), job), tickets_.end());
    }

  private:
    void serve() {
        while (true) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                posted_.wait(lock, [this] { return !tickets_.empty(); });
                job = tickets_.front();
                tickets_.pop_front();
                job->enter();
            }
            job->work();
            job->leave();
        }
    }

    const int pid_;
    std::mutex mutex_;
    std::condition_variable posted_;
    std::deque<std::shared_ptr<Job>> tickets_;
    int threads_ = 0;
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
    if (helpers <= 0) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    const auto job = std::make_shared<Job>(count, task);
    Pool::instance().post(job, helpers);
    job->work();
    Pool::instance().withdraw(job);
    job->wait_for_helpers();
}

}  // namespace detr_fast
