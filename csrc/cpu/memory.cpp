#include "memory.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace fused_resnet {
namespace {

struct Block {
  void* data;
  int64_t bytes, pass;  // pass: in which it was last taken
};

// Blocks that no tensor uses. Blocks in use are their tensors' own: they outlive a pool that is dropped.
class Pool {
 public:
  explicit Pool(int64_t least) : least_(least) {}
  ~Pool() { drop(); }

  bool serves(int64_t bytes) const { return bytes > 0 && bytes >= least_; }

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i) {  // at most a quarter is wasted
      const bool fits = free_[i].bytes >= bytes && free_[i].bytes <= bytes + bytes / 4;
      if (fits && (best == free_.size() || free_[i].bytes < free_[best].bytes)) best = i;
    }
    if (best < free_.size()) {
      const Block found = free_[best];
      free_.erase(free_.begin() + best);
      return {found.data, found.bytes, passes_};
    }
    constexpr int64_t kPage = 4096;
    const int64_t whole = ceil_div(bytes, kPage) * kPage;
    void* data = std::aligned_alloc(kPage, whole);
    if (!data) {
      release();
      data = std::aligned_alloc(kPage, whole);
    }
    if (!data) throw std::bad_alloc();
    return {data, whole, passes_};
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (dropped_) std::free(block.data);
    else free_.push_back(block);
  }

  // What two passes did not take goes back to the system.
  void end_pass() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++passes_;
    release([this](const Block& block) { return block.pass < passes_ - 2; });
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

  void drop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped_ = true;
    release();
  }

  std::vector<int64_t> kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (const Block& block : free_) sizes.push_back(block.bytes);
    return sizes;
  }

 private:
  template <typename F>
  void release(const F& which) {
    size_t left = 0;
    for (const Block& block : free_) {
      if (which(block)) std::free(block.data);
      else free_[left++] = block;
    }
    free_.resize(left);
  }
  void release() { release([](const Block&) { return true; }); }

  std::mutex mutex_;
  std::vector<Block> free_;
  int64_t least_, passes_ = 0;
  bool dropped_ = false;
};

using PoolPtr = std::shared_ptr<Pool>;

struct Pools {
  std::mutex mutex;
  std::unordered_map<int64_t, PoolPtr> all;
  int64_t next = 1;
};

Pools& pools() {
  static Pools* found = new Pools;  // never destroyed: tensors may be gone after all statics
  return *found;
}

PoolPtr pool_of(int64_t id) {
  Pools& found = pools();
  const std::lock_guard<std::mutex> lock(found.mutex);
  const auto entry = found.all.find(id);
  STD_TORCH_CHECK(entry != found.all.end(), "there is no memory pool ", id);
  return entry->second;
}

thread_local PoolPtr active;

// ---- operators --------------------------------------------------------------------------------------------------------

int64_t pool_new(int64_t least) {
  Pools& found = pools();
  const std::lock_guard<std::mutex> lock(found.mutex);
  found.all.emplace(found.next, std::make_shared<Pool>(least));
  return found.next++;
}

void pool_drop(int64_t id) {
  const PoolPtr pool = pool_of(id);
  pool->drop();
  Pools& found = pools();
  const std::lock_guard<std::mutex> lock(found.mutex);
  found.all.erase(id);
}

void pool_activate(int64_t id) { active = id ? pool_of(id) : nullptr; }
void pool_end_pass(int64_t id) { pool_of(id)->end_pass(); }
void pool_clear(int64_t id) { pool_of(id)->clear(); }
std::vector<int64_t> pool_kept(int64_t id) { return pool_of(id)->kept(); }

// (n, c, h, w), channels_last, of x's dtype.
Tensor new_images(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(n >= 0 && c >= 0 && h >= 0 && w >= 0, "sizes must not be negative");
  const int64_t size[] = {n, c, h, w}, stride[] = {h * w * c, 1, w * c, c};
  return new_large(x, 4, size, stride, dtype_code(x));
}

}  // namespace

Tensor new_large(const Tensor& like, int64_t dim, const int64_t* size, const int64_t* stride, int32_t dtype) {
  int64_t count = 1, extent = 1;
  for (int64_t d = 0; d < dim; ++d) count *= size[d], extent += size[d] ? (size[d] - 1) * stride[d] : 0;
  const int64_t bytes = count ? extent * like.element_size() : 0;
  const PoolPtr pool = active;
  if (!pool || !pool->serves(bytes)) return new_strided(like, dim, size, stride, dtype);
  struct Owned {
    PoolPtr pool;
    Block block;
    ~Owned() { pool->give(block); }
  };
  std::unique_ptr<Owned> owned(new Owned{pool, pool->take(bytes)});
  int32_t device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  const auto give_back = [](void*, void* owned) { delete static_cast<Owned*>(owned); };
  TORCH_ERROR_CODE_CHECK(torch_from_blob(owned->block.data, dim, size, stride, 0, dtype, aoti_torch_device_type_cpu(),
                                         device_index, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, owned.get()));
  owned.release();
  return Tensor(handle);
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("new_images", TORCH_BOX(&fused_resnet::new_images));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CompositeExplicitAutograd, m) {
  m.impl("pool_new", TORCH_BOX(&fused_resnet::pool_new));
  m.impl("pool_drop", TORCH_BOX(&fused_resnet::pool_drop));
  m.impl("pool_activate", TORCH_BOX(&fused_resnet::pool_activate));
  m.impl("pool_end_pass", TORCH_BOX(&fused_resnet::pool_end_pass));
  m.impl("pool_clear", TORCH_BOX(&fused_resnet::pool_clear));
  m.impl("pool_kept", TORCH_BOX(&fused_resnet::pool_kept));
}
