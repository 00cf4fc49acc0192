// How blocks and threads share a tensor's elements. Host and device; no CUDA in here, so that it can be tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../math.h"

namespace fused_resnet {

constexpr int32_t kThreads = 256;  // in a block
constexpr int32_t kBlocks = 2;     // per multiprocessor: as many as always fit, by registers
constexpr int32_t kAcross = 16;    // threads side by side along the channels, at most
constexpr int64_t kMostPositions = (int64_t(1) << 31) - (1 << 22);  // per channel: indices, one step further too, have 32 bits

// A tensor as `count` positions of each channel. Channels come in units that a thread takes at once.
//   rows (channels_last)   a position is a pixel, a unit a vector of channels
//   planes (NCHW)          a position is a vector of pixels, a unit one channel
// A block works on `across` units; part p of `parts` takes every parts-th group of positions, one for each of its threads
// along them.
struct Cut {
  int32_t count, inner;     // positions; those that lie side by side in a run
  int64_t outer, plane;     // elements from a run to the next, and from a channel to the next
  int32_t channels, unit;   // all of them; in a unit
  int32_t across;           // threads along the channels, a power of two
  int32_t blocks, parts;    // the grid

  FR_HD int32_t along() const { return kThreads / across; }  // threads along the positions
};

// Elements that are accessed at once: `most` where that divides `length` and the addresses (or-ed into one number) allow it,
// else 1.
inline int32_t vector_size(int64_t itemsize, int32_t most, int64_t length, uintptr_t addresses) {
  return length % most == 0 && addresses % (most * itemsize) == 0 ? most : 1;
}

// Units of channels and positions on a grid that fills the device once.
inline Cut cut(int64_t count, int64_t units, int32_t unit, int32_t multiprocessors) {
  Cut c{};
  c.count = int32_t(count), c.inner = 1, c.outer = units * unit, c.plane = 1;
  c.channels = int32_t(units * unit), c.unit = unit;
  for (c.across = 1; c.across < std::min<int64_t>(units, kAcross);) c.across *= 2;
  c.blocks = int32_t(ceil_div(units, c.across));
  const int64_t wanted = std::max<int64_t>(1, int64_t(kBlocks) * multiprocessors / c.blocks);
  c.parts = int32_t(std::min(ceil_div(count, c.along()), wanted));
  return c;
}

inline Cut cut_rows(int64_t n, int64_t c, int64_t s, int32_t vector, int32_t multiprocessors) {
  return cut(n * s, c / vector, vector, multiprocessors);
}

inline Cut cut_planes(int64_t n, int64_t c, int64_t s, int32_t vector, int32_t multiprocessors) {
  Cut plan{};
  plan.count = int32_t(n * s / vector), plan.inner = int32_t(s / vector), plan.outer = c * s, plan.plane = s;
  plan.channels = plan.blocks = int32_t(c), plan.unit = 1, plan.across = 1;
  const int64_t wanted = std::max<int64_t>(1, int64_t(kBlocks) * multiprocessors / c);
  plan.parts = int32_t(std::min(ceil_div(plan.count, kThreads), wanted));
  return plan;
}

// What a thread works on: one unit, every step-th position.
struct Share {
  int32_t channel, first, step;
  int64_t base;  // of the channel's elements
  bool inside;   // the unit exists

  FR_HD Share(const Cut& cut, int32_t thread, int32_t block, int32_t part)
      : channel((block * cut.across + thread % cut.across) * cut.unit),
        first(part * cut.along() + thread / cut.across),
        step(cut.parts * cut.along()),
        base(channel * cut.plane),
        inside(channel < cut.channels) {}
};

// A thread's positions in turn, from the first or (Reverse) from the last. First passes walk forward, second passes backward:
// what the first read last is still in the L2 cache.
template <int Vector, bool Rows, bool Reverse>
class Walk {
 public:
  FR_HD Walk(const Cut& cut, const Share& share)
      : left(share.first < cut.count ? (cut.count - 1 - share.first) / share.step + 1 : 0), inner_(cut.inner), outer_(cut.outer) {
    const int32_t position = Reverse ? cut.count - 1 - share.first : share.first;
    run_ = Rows ? position : position / inner_, runs_ = Rows ? share.step : share.step / inner_;
    place_ = Rows ? 0 : position % inner_, places_ = Rows ? 0 : share.step % inner_;
  }

  FR_HD int64_t offset() const { return run_ * outer_ + (Rows ? 0 : int64_t(place_) * Vector); }

  FR_HD int32_t position() const { return Rows ? run_ : run_ * inner_ + place_; }

  FR_HD void next() {
    run_ += Reverse ? -runs_ : runs_;
    if (Rows) return;
    place_ += Reverse ? -places_ : places_;
    if (Reverse ? place_ < 0 : place_ >= inner_) {
      place_ += Reverse ? inner_ : -inner_;
      run_ += Reverse ? -1 : 1;
    }
  }

  int32_t left;  // positions still to come

 private:
  int32_t inner_, run_, runs_, place_, places_;
  int64_t outer_;
};

// ---- elementwise over dense memory -------------------------------------------------------------------------------------

constexpr int32_t kFlat = 2;  // vectors of a thread

// Blocks for n elements in vectors; those that fill none are the first block's too.
inline int64_t flat_blocks(int64_t n, int32_t vector) { return std::max<int64_t>(1, ceil_div(n / vector, kThreads * kFlat)); }

// ---- per-channel results of all parts: few numbers, one block for kFinished channels -------------------------------------

constexpr int32_t kFinished = 8;

// ---- second moments: tiles of a symmetric (w, w) matrix, each from a part of the rows ------------------------------------

constexpr int32_t kTile = 64;     // rows and columns of a tile; a thread computes 4 x 4 of its elements
constexpr int32_t kDepth = 16;    // rows of the tensor that are in shared memory at once

struct Gram {
  int64_t rows;
  int32_t width, pairs, parts;  // of tiles (i, j) with i <= j; of the rows

  FR_HD int64_t first(int64_t part) const { return ceil_div(rows, kDepth) * part / parts * kDepth; }
};

inline Gram gram(int64_t rows, int64_t width, int32_t multiprocessors) {
  const int64_t tiles = ceil_div(width, kTile), pairs = tiles * (tiles + 1) / 2;
  const int64_t wanted = std::max<int64_t>(1, 2 * int64_t(kBlocks) * multiprocessors / pairs);
  return {rows, int32_t(width), int32_t(pairs), int32_t(std::min(ceil_div(rows, 8 * kDepth), wanted))};
}

}  // namespace fused_resnet
