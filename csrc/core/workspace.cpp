#include "core/workspace.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

#include "core/environment.hpp"
#include "core/huge_pages.hpp"

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

std::atomic<std::size_t> g_in_use{0};

// --- a test mode ----------------------------------------------------------------------------------
// With FASTCONV_GUARD_PAGES=1 in the environment a block is fresh, holds NaN and ends at a page that
// cannot be touched, or up to 60 bytes before it where its size is no multiple of the alignment; there
// is such a page before it too. What lies between it and the pages must be as it was in the end.

bool guarded() {
  static const bool asked = flag_from_environment("FASTCONV_GUARD_PAGES", false);
  return asked;
}

constexpr std::uint32_t kPoison = 0x7FC0DEAD;  // a quiet NaN

struct GuardedBlock {
  std::size_t page, inner, before;  // `before`: bytes from the first page to the data

  explicit GuardedBlock(std::size_t bytes)
      : page(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        inner((bytes + page - 1) / page * page),
        before((inner - bytes) / Workspace::kAlignment * Workspace::kAlignment) {}

  void* allocate() const {
    void* const map =
        mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    char* const first = static_cast<char*>(map) + page;
    if (mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) {
      munmap(map, inner + 2 * page);
      throw std::bad_alloc();
    }
    auto* const words = reinterpret_cast<std::uint32_t*>(first);
    std::fill_n(words, inner / sizeof kPoison, kPoison);
    return first + before;
  }

  void release(void* data, std::size_t bytes) const {
    char* const first = static_cast<char*>(data) - before;
    const std::size_t behind = (before + bytes + sizeof kPoison - 1) / sizeof kPoison;
    const auto* const words = reinterpret_cast<const std::uint32_t*>(first);
    for (std::size_t i = 0; i < inner / sizeof kPoison; ++i) {
      if ((i < before / sizeof kPoison || i >= behind) && words[i] != kPoison) {
        std::fprintf(stderr, "fastconv: scratch memory of %zu bytes was written beside\n", bytes);
        std::abort();  // which only the test mode does
      }
    }
    munmap(first - page, inner + 2 * page);
  }
};

}  // namespace

WorkspaceBytes workspace_bytes() {
  const std::lock_guard lock(g_cache.mutex);
  return {g_in_use.load(std::memory_order_relaxed), g_cache.bytes};
}

Workspace::Workspace(std::size_t bytes) {
  if (bytes == 0) return;
  if (guarded()) {
    data_ = GuardedBlock(bytes).allocate();
    capacity_ = bytes;
  } else {
    acquire(bytes);
  }
  g_in_use.fetch_add(capacity_, std::memory_order_relaxed);
}

// The constructor has read the environment, and thrown if that was not to be read.
// NOLINTNEXTLINE(bugprone-exception-escape)
Workspace::~Workspace() {
  if (!data_) return;
  g_in_use.fetch_sub(capacity_, std::memory_order_relaxed);
  if (guarded()) {
    GuardedBlock(capacity_).release(data_, capacity_);
  } else {
    release();
  }
}

#if defined(FASTCONV_EXACT_WORKSPACE)

// For tests: no byte more than asked for, and nothing kept.
void Workspace::acquire(std::size_t bytes) {
  // Not aligned_alloc, which takes multiples of the alignment alone.
  if (posix_memalign(&data_, kAlignment, bytes) != 0) throw std::bad_alloc();
  capacity_ = bytes;
}
void Workspace::release() { std::free(data_); }

#else

void Workspace::acquire(std::size_t bytes) {
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
  data_ = std::aligned_alloc(kAlignment, capacity_);
  if (!data_) throw std::bad_alloc();
  advise_huge_pages(data_, capacity_);
}

void Workspace::release() {
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
