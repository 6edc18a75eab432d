// Threads that stay alive between tokens, and the barrier between the parts of a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace wb {

// Runs a function on all threads at once; the calling thread is number 0. One run at a time.
class Pool {
 public:
  // cores: processor of each thread (the caller's is left as it is), or empty to let the system place them.
  explicit Pool(int threads, const std::vector<int>& cores = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  void run(const std::function<void(int)>& work);

  // Wait until all threads of the run have come here.
  void barrier() {
    if (threads_ == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) relax(spins);
  }

 private:
  static void relax(int spins);
  void serve(int index);

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
  alignas(64) std::atomic<std::uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  const std::function<void(int)>* work_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
  std::vector<std::thread> workers_;
};

}  // namespace wb
