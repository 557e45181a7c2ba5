#include "core/workspace.hpp"

#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastconv {
namespace {

struct Block {
  void* data;
  std::size_t capacity;
};

// Blocks no call uses now. Few and bounded: a server that ran one large shape gives it back.
constexpr std::size_t kMostKeptBlocks = 8;
constexpr std::size_t kMostKeptBytes = std::size_t{64} << 20;

struct Cache {
  std::mutex mutex;
  std::vector<Block> blocks;
  std::size_t bytes = 0;
};

Cache& cache();

// A child forked while another thread holds the mutex would find it locked for ever.
Cache* make_cache() {
  pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                 [] { cache().mutex.unlock(); });
  return new Cache;
}

// Leaked on purpose: calls may still run while static objects are destroyed.
Cache& cache() {
  static Cache* instance = make_cache();
  return *instance;
}

}  // namespace

#if defined(FASTCONV_EXACT_WORKSPACE)

// For tests: no byte more than asked for, and nothing kept.
Workspace::Workspace(std::size_t bytes) {
  if (bytes == 0) return;
  // Not aligned_alloc, which takes multiples of the alignment alone.
  if (posix_memalign(&data_, 64, bytes) != 0) throw std::bad_alloc();
}
Workspace::~Workspace() { std::free(data_); }

#else

Workspace::Workspace(std::size_t bytes) {
  if (bytes == 0) return;
  Cache& kept = cache();
  {
    const std::lock_guard lock(kept.mutex);
    auto best = kept.blocks.end();
    for (auto it = kept.blocks.begin(); it != kept.blocks.end(); ++it) {
      if (it->capacity >= bytes && (best == kept.blocks.end() || it->capacity < best->capacity)) {
        best = it;
      }
    }
    if (best != kept.blocks.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      kept.bytes -= capacity_;
      kept.blocks.erase(best);
      return;
    }
  }
  // Rounded up so that neighbouring shapes share a block.
  constexpr std::size_t kGrain = std::size_t{64} << 10;
  capacity_ = (bytes + kGrain - 1) / kGrain * kGrain;
  if (capacity_ < bytes) throw std::bad_alloc();
  data_ = std::aligned_alloc(64, capacity_);
  if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() {
  if (!data_) return;
  Cache& kept = cache();
  void* drop[kMostKeptBlocks + 1];
  std::size_t drops = 0;
  if (capacity_ > kMostKeptBytes) {
    drop[drops++] = data_;
  } else {
    const std::lock_guard lock(kept.mutex);
    // The oldest go first: what was used last is what the next call will ask for.
    while (!kept.blocks.empty() &&
           (kept.blocks.size() >= kMostKeptBlocks || kept.bytes + capacity_ > kMostKeptBytes)) {
      drop[drops++] = kept.blocks.front().data;
      kept.bytes -= kept.blocks.front().capacity;
      kept.blocks.erase(kept.blocks.begin());
    }
    kept.blocks.reserve(kMostKeptBlocks);
    kept.blocks.push_back({data_, capacity_});
    kept.bytes += capacity_;
  }
  for (std::size_t i = 0; i < drops; ++i) std::free(drop[i]);
}

#endif

}  // namespace fastconv
