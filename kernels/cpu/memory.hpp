// Memory for weights and caches: 64-byte aligned, in large pages where the system grants them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wb {

inline constexpr std::size_t kAlign = 64;

inline std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// A zeroed, aligned array that owns its memory.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(std::size_t n) : size_(n) {
    if (n == 0) return;
    const std::size_t bytes = round_up(n * sizeof(T), kAlign);
    void* p = std::aligned_alloc(kAlign, bytes);
    if (p == nullptr) throw std::bad_alloc();
    std::memset(p, 0, bytes);
    data_.reset(static_cast<T*>(p));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](std::size_t i) { return data_.get()[i]; }
  const T& operator[](std::size_t i) const { return data_.get()[i]; }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

// For vectors that are read 64 bytes at a time: a load across two lines of the cache takes twice as long.
template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kAlign})); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{kAlign}); }
  bool operator==(const AlignedAllocator&) const = default;
};
template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

// Hands out zeroed memory that lives as long as the arena. Weights lie in one arena, in the order of their use, so that
// a few large pages cover them: with 4 KiB pages, address translation costs a tenth of a decoding step.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (auto& [p, n] : chunks_) release(p, n);
  }

  template <class T>
  T* take(std::size_t n) {
    return reinterpret_cast<T*>(take_bytes(n * sizeof(T)));
  }
  std::size_t used() const { return used_; }

 private:
  static constexpr std::size_t kPage = std::size_t{2} << 20;
  static constexpr std::size_t kChunk = std::size_t{64} << 20;
  static constexpr std::size_t kPast = 1024;  // bytes past an array that can be read: a tile's, of which it holds the first

  std::uint8_t* take_bytes(std::size_t n) {
    n = round_up(n, kAlign);
    if (n + kPast > left_) {
      const std::size_t bytes = round_up(std::max(n + kPast, kChunk), kPage);
      next_ = acquire(bytes);
      chunks_.emplace_back(next_, bytes);
      left_ = bytes;
    }
    std::uint8_t* p = next_;
    next_ += n;
    left_ -= n;
    used_ += n;
    return p;
  }

#if defined(__linux__)
  static std::uint8_t* acquire(std::size_t bytes) {
    // Mapped with one page to spare, so that the part that is kept begins on a large page.
    void* raw = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<std::uint8_t*>(raw);
    auto* aligned = reinterpret_cast<std::uint8_t*>(round_up(reinterpret_cast<std::uintptr_t>(begin), kPage));
    if (aligned > begin) munmap(begin, static_cast<std::size_t>(aligned - begin));
    const std::size_t tail = static_cast<std::size_t>(begin + bytes + kPage - (aligned + bytes));
    if (tail > 0) munmap(aligned + bytes, tail);
    madvise(aligned, bytes, MADV_HUGEPAGE);
    return aligned;
  }
  static void release(std::uint8_t* p, std::size_t n) { munmap(p, n); }
#else
  static std::uint8_t* acquire(std::size_t bytes) {
    void* p = std::aligned_alloc(kPage, bytes);
    if (p == nullptr) throw std::bad_alloc();
    std::memset(p, 0, bytes);
    return static_cast<std::uint8_t*>(p);
  }
  static void release(std::uint8_t* p, std::size_t) { std::free(p); }
#endif

  std::vector<std::pair<std::uint8_t*, std::size_t>> chunks_;
  std::uint8_t* next_ = nullptr;
  std::size_t left_ = 0;
  std::size_t used_ = 0;
};

}  // namespace wb
