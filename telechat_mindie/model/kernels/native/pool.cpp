#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace telechat {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 us: longer than the gap between two kernels of a graph, shorter than anything a user would notice.
constexpr int kSpins = 2000;

class Pool {
 public:
  void run(size_t threads, size_t count, Chunk chunk, void* context) {
    while (workers_ + 1 < threads) {
      std::thread([this] { work(); }).detach();  // lives as long as the process
      ++workers_;
    }
    chunk_ = chunk;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    // Publishes chunk_ and context_ to whoever takes a chunk of this generation.
    ticket_.store((++generation_ << 32) | count);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    while (take()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        sched_yield();  // a worker was descheduled in the middle of its chunk
      }
    }
  }

  std::mutex busy;

 private:
  // Takes and runs one chunk. The ticket holds the generation and the chunks left; as long as a chunk that was taken is
  // not counted in done_, run() has not returned, so chunk_ and context_ are still those of its generation.
  bool take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (uint32_t(ticket) == 0) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire));
    chunk_(context_, uint32_t(ticket) - 1);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  [[noreturn]] void work() {
    for (;;) {
      for (int spins = 0; spins < kSpins; ++spins) {
        if (take()) spins = 0;
        relax();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      // Sequentially consistent with run(): either it sees this sleeper or this thread sees its ticket.
      wake_.wait(lock, [this] { return uint32_t(ticket_.load()) != 0; });
      sleepers_.fetch_sub(1);
    }
  }

  std::atomic<uint64_t> ticket_{0};
  std::atomic<size_t> done_{0};
  std::atomic<int> sleepers_{0};
  Chunk chunk_ = nullptr;
  void* context_ = nullptr;
  uint64_t generation_ = 0;
  size_t workers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
};

std::atomic<size_t> threads{1};
std::atomic<Pool*> pool{nullptr};

// A forked child has none of its parent's threads: it starts with a pool of its own. The old one is left as it is, since
// its locks may be held by threads that are gone.
void renew() { pool.store(new Pool); }

__attribute__((constructor)) void start() {
  renew();
  pthread_atfork(nullptr, nullptr, renew);
}

}  // namespace

size_t thread_count() { return threads.load(std::memory_order_relaxed); }

void parallel(size_t count, Chunk chunk, void* context) {
  if (count > 1 && thread_count() > 1) {
    Pool* shared = pool.load();
    std::unique_lock<std::mutex> owner(shared->busy, std::try_to_lock);
    if (owner.owns_lock()) {
      shared->run(thread_count(), count, chunk, context);
      return;
    }
  }
  for (size_t index = 0; index < count; ++index) chunk(context, index);
}

}  // namespace telechat

extern "C" void telechat_set_threads(int count) { telechat::threads.store(count < 1 ? 1 : size_t(count)); }
