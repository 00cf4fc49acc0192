#include "memory.h"

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fused_resnet {
namespace {

struct Block {
  char* data;
  int64_t bytes;
};

constexpr int64_t kPage = 4096;

// A range of addresses from which blocks are cut, the lowest that fits first. What one block leaves serves others of any size,
// so that few more pages are ever in use than tensors need at once.
class Slab {
 public:
  explicit Slab(int64_t bytes) : bytes_(bytes), free_{{0, bytes}} {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = data == MAP_FAILED ? nullptr : static_cast<char*>(data);
  }
  ~Slab() {
    if (data_) munmap(data_, bytes_);
  }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  bool there() const { return data_; }
  bool empty() const {  // neither used nor kept
    return std::all_of(pages_.begin(), pages_.end(), [](int64_t pass) { return pass == kNone; });
  }
  bool has(const char* data) const { return data >= data_ && data < data_ + bytes_; }

  char* take(int64_t bytes, int64_t pass) {
    const auto fits = [=](const auto& range) { return range.second >= bytes; };
    const auto range = std::find_if(free_.begin(), free_.end(), fits);
    if (range == free_.end()) return nullptr;
    const auto [at, size] = *range;
    free_.erase(range);
    if (size > bytes) free_.emplace(at + bytes, size - bytes);
    const size_t end = (at + bytes) / kPage;
    if (pages_.size() < end) pages_.resize(end, kNone);
    std::fill(pages_.begin() + at / kPage, pages_.begin() + end, pass);
    return data_ + at;
  }

  void give(const Block& block) {
    int64_t at = block.data - data_, end = at + block.bytes;
    auto next = free_.lower_bound(at);
    if (next != free_.end() && next->first == end) end += next->second, next = free_.erase(next);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == at) at = before->first, free_.erase(before);
    }
    free_.emplace(at, end - at);
  }

  // Gives pages that no tensor uses, and none has used from pass `least` on, back to the system.
  void release(int64_t least) {
    runs([=](int64_t pass) { return pass != kNone && pass < least; }, [this](int64_t at, int64_t bytes) {
      madvise(data_ + at, bytes, MADV_DONTNEED);
      std::fill_n(pages_.begin() + at / kPage, bytes / kPage, kNone);
    });
  }

  void kept(std::vector<int64_t>& sizes) {
    runs([](int64_t pass) { return pass != kNone; }, [&](int64_t, int64_t bytes) { sizes.push_back(bytes); });
  }

 private:
  static constexpr int64_t kNone = -1;

  // Calls found(from where, how many bytes) for each run of free pages whose last pass is such.
  template <typename Such, typename Found>
  void runs(const Such& such, const Found& found) {
    for (const auto& [first, size] : free_) {
      const int64_t last = std::min<int64_t>((first + size) / kPage, pages_.size());
      for (int64_t page = first / kPage; page < last; ++page) {
        const int64_t begin = page;
        while (page < last && such(pages_[page])) ++page;
        if (page > begin) found(begin * kPage, (page - begin) * kPage);
      }
    }
  }

  char* data_;
  int64_t bytes_;
  std::map<int64_t, int64_t> free_;  // from where, how many bytes
  std::vector<int64_t> pages_;       // the pass in which a tensor last took each; kNone: the system has it
};

// What is kept between passes. Blocks in use are their tensors' own: they outlive a pool that is dropped.
class Pool {
 public:
  explicit Pool(int64_t least) : least_(least) {}

  bool serves(int64_t bytes) const { return bytes > 0 && bytes >= least_; }

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    constexpr int64_t kSlab = int64_t(1) << 30;  // addresses cost nothing until they are written to
    bytes = ceil_div(bytes, kPage) * kPage;
    for (const auto& slab : slabs_) {
      if (char* data = slab->take(bytes, passes_)) return {data, bytes};
    }
    auto slab = std::make_unique<Slab>(std::max(bytes, kSlab));
    if (!slab->there()) slab = std::make_unique<Slab>(bytes);
    if (!slab->there()) {
      release(passes_ + 1);
      slab = std::make_unique<Slab>(bytes);
    }
    if (!slab->there()) throw std::bad_alloc();
    char* data = slab->take(bytes, passes_);
    slabs_.push_back(std::move(slab));
    return {data, bytes};
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& slab : slabs_) {
      if (slab->has(block.data)) slab->give(block);
    }
    if (dropped_) release(passes_ + 1);
  }

  // What two passes did not take goes back to the system.
  void end_pass() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release(++passes_ - 2);
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release(passes_ + 1);
  }

  void drop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    dropped_ = true;
    release(passes_ + 1);
  }

  std::vector<int64_t> kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (const auto& slab : slabs_) slab->kept(sizes);
    return sizes;
  }

 private:
  void release(int64_t least) {
    for (auto& slab : slabs_) slab->release(least);
    const auto gone = [](const auto& slab) { return slab->empty(); };
    slabs_.erase(std::remove_if(slabs_.begin(), slabs_.end(), gone), slabs_.end());
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Slab>> slabs_;
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
