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
#include <vector>

#if defined(_WIN32)
#include <process.h>
#define DETR_FAST_GETPID _getpid
#else
#include <unistd.h>
#define DETR_FAST_GETPID getpid
#endif
#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace detr_fast {
namespace {

class Job {
  public:
    Job(int64_t count, int threads, const std::function<void(int64_t)>& task)
        : count_(count), task_(task), shares_(static_cast<size_t>(threads)) {
        for (int t = 0; t < threads; ++t) shares_[t].next = first_of(t);
    }

    // The thread takes its own share of the tasks from the first on, then what is left of the others'.
    void work(int thread) {
        const int threads = static_cast<int>(shares_.size());
        if (thread >= threads) return;
        for (int other = 0; other < threads; ++other) work_on((thread + other) % threads);
    }

    void help() {
        work(helpers_that_came_.fetch_add(1) + 1);
        const std::lock_guard<std::mutex> lock(mutex_);
        helpers_.fetch_sub(1);
        left_.notify_all();
    }

    void enter() { helpers_.fetch_add(1); }

    void wait_for_helpers() {
        std::unique_lock<std::mutex> lock(mutex_);
        left_.wait(lock, [this] { return helpers_.load() == 0; });
        // Moved, so that the caller alone holds it: a helper may be the last to let go of the job.
        if (error_) std::rethrow_exception(std::move(error_));
    }

  private:
    struct alignas(64) Share {  // a cache line, so that threads do not take each other's away
        std::atomic<int64_t> next{0};
    };

    int64_t first_of(int64_t thread) const { return count_ * thread / static_cast<int64_t>(shares_.size()); }

    void work_on(int thread) {
        std::atomic<int64_t>& next = shares_[thread].next;
        const int64_t end = first_of(thread + 1);
        for (int64_t i = next.fetch_add(1); i < end && !failed_.load(); i = next.fetch_add(1)) {
            try {
                task_(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
                failed_.store(true);
            }
        }
    }

    const int64_t count_;
    const std::function<void(int64_t)>& task_;
    std::vector<Share> shares_;
    std::atomic<bool> failed_{false};
    std::atomic<int> helpers_{0};
    std::atomic<int> helpers_that_came_{0};
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
            job->help();
        }
    }

    const int pid_;
    std::mutex mutex_;
    std::condition_variable posted_;
    std::deque<std::shared_ptr<Job>> tickets_;
    int threads_ = 0;
};

// The process that loaded this module.
const auto process = DETR_FAST_GETPID();

// The OpenMP runtime that torch brings into the process, where it is one that GCC's programs can call. Its threads do
// torch's work before and after: they are awake, and the rows that a thread is given are in its cache.
class Team {
  public:
    static const Team& instance() {
        static const Team team;
        return team;
    }

    // Its threads do not survive fork.
    bool is_there() const { return run_ != nullptr && thread_ != nullptr && process == DETR_FAST_GETPID(); }

    void run(Job& job) const {
        struct Argument {
            Job& job;
            int (*thread)();
        } argument{job, thread_};
        const auto work = [](void* of) {
            const auto& [own_job, thread] = *static_cast<Argument*>(of);
            own_job.work(thread());
        };
        // With torch's own number of threads (0 asks for it): the runtime ends threads that a smaller team leaves over.
        run_(work, &argument, 0, 0);
    }

  private:
    Team() {
#if defined(__linux__)
        run_ = reinterpret_cast<Run>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread_ = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
    }

    using Run = void (*)(void (*work)(void*), void* argument, unsigned threads, unsigned flags);

    Run run_ = nullptr;
    int (*thread_)() = nullptr;
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    const int workers = static_cast<int>(std::min<int64_t>(threads, count));
    if (workers <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    if (const Team& team = Team::instance(); team.is_there()) {
        Job job(count, workers, task);
        team.run(job);
        job.wait_for_helpers();
        return;
    }
    const auto job = std::make_shared<Job>(count, workers, task);
    Pool::instance().post(job, workers - 1);
    job->work(0);
    Pool::instance().withdraw(job);
    job->wait_for_helpers();
}

}  // namespace detr_fast
