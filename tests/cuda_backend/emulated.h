// Runs the CUDA kernels on a CPU: a fiber per thread of a block, blocks one after another. See csrc/cuda/device.h.
//
// Threads run until they wait for each other, in one order, then on in the opposite order, and blocks from the last to the
// first in every other launch: what depends on an order that CUDA does not promise gives other results.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define FR_DEVICE_KEY CPU
#define FR_DEVICE_LIBRARY fused_resnet_emulated

namespace fused_resnet {

struct Index { unsigned x, y, z; };
inline Index threadIdx, blockIdx;

// Where a fiber, or what schedules them, goes on. Not by swapcontext, which asks the kernel twice; but sanitizers know that.
class Context {
 public:
  void start(char* stack, size_t size, void (*main)()) {
    getcontext(&place_);
    place_.uc_stack.ss_sp = stack;
    place_.uc_stack.ss_size = size;
    makecontext(&place_, main, 0);
    begun_ = false;
  }

  void leave_for(Context& next) {
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&place_, &next.place_);
#else
    if (_setjmp(jump_)) return;
    if (next.begun_) _longjmp(next.jump_, 1);
    next.begun_ = true;
    setcontext(&next.place_);
#endif
  }

 private:
  ucontext_t place_;
  jmp_buf jump_;
  bool begun_ = true;
};

// The threads of one block. A fiber takes the next thread when its own has ended, so that kernels that never wait need one.
class Block {
 public:
  void run(int32_t threads, const std::function<void()>& body) {
    threads_ = threads, body_ = &body, next_ = 0, current_ = this;
    int32_t used = 0;
    while (next_ < threads_) enter(used++);
    for (bool forward = false;; forward = !forward) {
      int32_t waiting = 0;
      for (int32_t i = 0; i < used; ++i) waiting += fibers_[i]->waits;
      if (waiting == 0) return;
      if (waiting != threads_) fail("some threads of a block wait for each other, others have ended");
      for (int32_t i = 0; i < used; ++i) resume(forward ? i : used - 1 - i);
    }
  }

  static void wait() { current_->leave(true); }

 private:
  static constexpr size_t kStack = 48 * 1024;
  struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    int32_t thread;
    bool waits;
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulated kernel: %s\n", what);
    abort();
  }

  void enter(int32_t i) {
    if (i == int32_t(fibers_.size())) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_[i]->context.start(fibers_[i]->stack.get(), kStack, &Block::main);
    }
    resume(i);
  }

  void resume(int32_t i) {
    running_ = fibers_[i].get();
    threadIdx.x = unsigned(running_->thread);
    running_->waits = false;
    scheduler_.leave_for(running_->context);
  }

  void leave(bool waits) {
    Fiber* fiber = running_;
    fiber->waits = waits;
    fiber->context.leave_for(scheduler_);
  }

  static void main() {
    for (;;) {
      Block& block = *current_;
      while (block.next_ < block.threads_) {
        Fiber& fiber = *block.running_;
        fiber.thread = block.next_++;
        threadIdx.x = unsigned(fiber.thread);
        (*block.body_)();
      }
      block.leave(false);
    }
  }

  static inline Block* current_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* body_;
  Context scheduler_;
  Fiber* running_;
  int32_t threads_, next_;
};

inline void __syncthreads() { Block::wait(); }

class Device {
 public:
  explicit Device(const Tensor&) {}

  int32_t multiprocessors() const {
    const char* number = std::getenv("EMULATED_MULTIPROCESSORS");
    return number ? std::atoi(number) : 3;
  }

  int32_t major_capability() const {
    const char* major = std::getenv("EMULATED_CAPABILITY");
    return major ? std::atoi(major) : 9;
  }
  int32_t minor_capability() const { return 0; }
  std::nullptr_t stream() const { return nullptr; }

  template <typename... P, typename... A>
  void launch(const char*, void (*kernel)(P...), int64_t blocks, int64_t parts, A&&... args) const {
    static Block block;
    static int64_t launches = 0;
    std::tuple<P...> values(std::forward<A>(args)...);
    const int64_t number = blocks * parts;
    const bool backward = launches++ % 2;
    for (int64_t b = 0; b < number; ++b) {
      const int64_t i = backward ? number - 1 - b : b;
      blockIdx = {unsigned(i % blocks), unsigned(i / blocks), 0};
      block.run(kThreads, [&] { std::apply(kernel, values); });
    }
  }
};

}  // namespace fused_resnet
