#include "core/workspace.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

namespace fastconv {
namespace {

struct Block {
  void* data;
  std::size_t capacity;
};

// Blocks no call uses now. Few and bounded: a server that ran one large shape gives it back.
constexpr std::size_t kMostKeptBlocks = 8;
constexpr std::size_t kMostKeptBytes = std::size_t{64} << 20;

// Allocates nothing itself: a block is given back where no memory is left, too. Needs no destructor:
// calls may still run while static objects are destroyed.
struct Cache {
  std::mutex mutex;
  Block blocks[kMostKeptBlocks] = {};  // the oldest first
  std::size_t count = 0;
  std::size_t bytes = 0;

  Block take(std::size_t which) {
    const Block block = blocks[which];
    std::copy(blocks + which + 1, blocks + count, blocks + which);
    --count;
    bytes -= block.capacity;
    return block;
  }
  void keep(Block block) {
    blocks[count++] = block;
    bytes += block.capacity;
  }
};

constinit Cache g_cache;

// A child forked while another thread holds the mutex would find it locked for ever.
[[maybe_unused]] const int g_registered = pthread_atfork(
    [] { g_cache.mutex.lock(); }, [] { g_cache.mutex.unlock(); }, [] { g_cache.mutex.unlock(); });

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
  {
    Cache& kept = g_cache;
    const std::lock_guard lock(kept.mutex);
    std::size_t best = kept.count;
    for (std::size_t i = 0; i < kept.count; ++i) {
      const std::size_t capacity = kept.blocks[i].capacity;
      if (capacity >= bytes && (best == kept.count || capacity < kept.blocks[best].capacity)) {
        best = i;
      }
    }
    if (best < kept.count) {
      const Block block = kept.take(best);
      data_ = block.data;
      capacity_ = block.capacity;
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
  void* drop[kMostKeptBlocks + 1];
  std::size_t drops = 0;
  if (capacity_ > kMostKeptBytes) {
    drop[drops++] = data_;
  } else {
    Cache& kept = g_cache;
    const std::lock_guard lock(kept.mutex);
    // The oldest go first: what was used last is what the next call will ask for.
    while (kept.count > 0 &&
           (kept.count == kMostKeptBlocks || kept.bytes + capacity_ > kMostKeptBytes)) {
      drop[drops++] = kept.take(0).data;
    }
    kept.keep({data_, capacity_});
  }
  for (std::size_t i = 0; i < drops; ++i) std::free(drop[i]);
}

#endif

}  // namespace fastconv
