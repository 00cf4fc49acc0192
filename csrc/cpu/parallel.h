// Threads and instruction sets for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "../math.h"

// Plain loops are compiled once per x86 level and chosen at load time. Everything they call must be FR_HD (always inlined).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FR_CLONES
#endif

namespace fused_resnet {

constexpr int64_t kGrain = 32768;  // elements that are worth a thread (as in at::parallel_for's users)

// f(begin, end) for parts of [0, n), an item being about `work` elements. The same n and work give a thread the same part.
template <typename F>
void parallel_ranges(int64_t n, int64_t work, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), f);
}

// f(i) for every i in [0, n). With reverse a thread meets its items in the opposite order, so that a second pass starts with
// what is still in its cache.
template <typename F>
void parallel_items(int64_t n, int64_t work, bool reverse, const F& f) {
  parallel_ranges(n, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(reverse ? begin + end - 1 - i : i);
  });
}

// f(next) on each thread; next() gives the next item of [0, n), or -1. A thread begins with its own share, in order, so that
// neighbours share what they read; then it takes from the others' shares. So a thread that another program slows down, or a
// slower core, takes fewer items.
template <typename F>
void parallel_dynamic(int64_t n, int64_t work, const F& f) {
  const std::unique_ptr<std::atomic<bool>[]> taken(new std::atomic<bool>[n]());
  parallel_ranges(n, work, [&](int64_t begin, int64_t) {
    int64_t seen = 0;
    f([&] {
      while (seen < n) {
        const int64_t item = (begin + seen++) % n;
        if (!taken[item].exchange(true, std::memory_order_relaxed)) return item;
      }
      return int64_t{-1};
    });
  });
}

}  // namespace fused_resnet
