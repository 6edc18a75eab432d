#include "pool.hpp"

#include <chrono>
#include <stdexcept>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(WB_X86)
#include <immintrin.h>
#endif

namespace wb {

namespace {

// Steps follow one another within microseconds; a thread that slept between them would wake too late.
constexpr auto kSpin = std::chrono::microseconds(300);

void pin(std::thread& thread, int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(core), &set);
  if (pthread_setaffinity_np(thread.native_handle(), sizeof set, &set) != 0)
    throw std::invalid_argument("A thread cannot run on core " + std::to_string(core) + " of this machine.");
#else
  (void)thread;
  (void)core;
#endif
}

}  // namespace

void Pool::relax(int spins) {
#if defined(WB_X86)
  _mm_pause();
#endif
  // A partner that the system has taken off its core needs the core more than this loop does.
  if (spins > 256) std::this_thread::yield();
}

Pool::Pool(int threads, const std::vector<int>& cores) : threads_(threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("An engine needs 1 to 1024 threads.");
  if (!cores.empty() && cores.size() != static_cast<std::size_t>(threads))
    throw std::invalid_argument("One core for each thread is needed, or none at all.");
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    for (std::size_t i = 1; i < cores.size(); ++i) pin(workers_[i - 1], cores[i]);
  } catch (...) {
    stop_ = true;
    generation_.fetch_add(1);
    { std::lock_guard lock(mutex_); }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    throw;
  }
}

Pool::~Pool() {
  stop_.store(true);
  generation_.fetch_add(1, std::memory_order_release);
  { std::lock_guard lock(mutex_); }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(const std::function<void(int)>& work) {
  if (threads_ == 1) {
    work(0);
    return;
  }
  work_ = &work;
  generation_.fetch_add(1, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }
  work(0);
  barrier();  // nobody is inside `work` any more
}

void Pool::serve(int index) {
  std::uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      relax(spins);
      if (spins % 64 == 63 && std::chrono::steady_clock::now() > until) {
        std::unique_lock lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
        break;
      }
    }
    if (stop_.load()) return;
    ++seen;
    (*work_)(index);
    barrier();
  }
}

}  // namespace wb
