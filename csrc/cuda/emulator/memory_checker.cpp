#include "cuda/emulator/memory_checker.hpp"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/emulator/allocations.hpp"
#include "cuda/emulator/state.hpp"

namespace fastconv::emulator {
namespace {

// --- the module that this is compiled into ------------------------------------------------------

struct Module {
  std::uintptr_t base = 0;
  std::string path;
  std::vector<std::pair<std::uintptr_t, std::uintptr_t>> constants;  // read-only segments
};

int find_module(dl_phdr_info* info, std::size_t, void* result) {
  Module& module = *static_cast<Module*>(result);
  if (info->dlpi_addr != module.base) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const bool constant =
        (header.p_type == PT_LOAD && (header.p_flags & PF_W) == 0) || header.p_type == PT_GNU_RELRO;
    const std::uintptr_t begin = module.base + header.p_vaddr;
    if (constant) module.constants.emplace_back(begin, begin + header.p_memsz);
  }
  return 1;
}

const Module& this_module() {
  static const Module module = [] {
    Module found;
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&find_module), &info);
    found.base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
    found.path = info.dli_fname;
    if (found.path.find('/') == std::string::npos) found.path = "/proc/self/exe";
    dl_iterate_phdr(&find_module, &found);
    return found;
  }();
  return module;
}

bool is_constant(std::uintptr_t address, std::size_t bytes) {
  for (const auto& [begin, end] : this_module().constants)
    if (address >= begin && address + bytes <= end) return true;
  return false;
}

std::map<std::uint32_t, std::string> known_places;  // by instruction

// Stands for an instruction where the emulator itself makes an access. A copy makes two.
std::uint32_t instruction_at(const std::string& place, bool write) {
  static std::map<std::pair<std::string, bool>, std::uint32_t> known;
  const auto [at, is_new] =
      known.try_emplace({place, write}, 0xffffffff - std::uint32_t(known.size()));
  if (is_new) known_places[at->second] = place;
  return at->second;
}

// file:line of an instruction, by addr2line: the innermost inlined function that is not ours.
std::string locate(std::uint32_t pc) {
  const auto [place, is_new] = known_places.try_emplace(pc);
  if (!is_new) return place->second;
  char text[1024];
  std::snprintf(text, sizeof text, "addr2line -i -e '%s' %#x 2>/dev/null",
                this_module().path.c_str(), pc - 1);
  std::string found;
  if (FILE* lines = popen(text, "r")) {
    while (found.empty() && std::fgets(text, sizeof text, lines) != nullptr) {
      if (std::strstr(text, "cuda/emulator/") != nullptr || text[0] == '?') continue;
      const char* name = std::strrchr(text, '/');
      found = name != nullptr ? name + 1 : text;
      found.resize(found.find_first_of(" \n"));
    }
    pclose(lines);
  }
  std::snprintf(text, sizeof text, "instruction %#x", pc);
  place->second = found.empty() ? text : found;
  return place->second;
}

// --- who touched what ---------------------------------------------------------------------------

constexpr std::uint16_t kManyWarps = 0xffff;
constexpr std::uint8_t kManyLanes = 0xff;

// The last write, or the reads since the last barrier taken together.
struct Mark {
  std::uint32_t block = 0;  // serial number, of several blocks the last one; 0: none
  std::uint32_t pc = 0;
  std::uint16_t barriers = 0, warp_barriers = 0;
  std::uint16_t warp = 0;
  std::uint8_t lane = 0;
  bool several_blocks = false;
};

struct Cell {
  Mark write, read;
  bool copying = false;     // an asynchronous copy into it has not been waited for
  std::int32_t parts = -1;  // in Shadow::parts, from the first access to a part of the word on
};

struct Shadow {
  std::vector<Cell> words;
  std::vector<std::array<Cell, 4>> parts;
};

Shadow shared_shadow;
std::unordered_map<std::uintptr_t, Shadow> global_shadows;  // by the allocation's address

struct Access {
  std::uintptr_t address;
  std::size_t bytes;
  bool write, shared;
  std::uint32_t pc;
  std::string place;   // instead of pc, where the emulator makes the access
  bool counts = true;  // in the profile
};

std::string in_words(const Access& access, const char* verb = nullptr) {
  return std::string(verb != nullptr ? verb
                     : access.write  ? "write"
                                     : "read") +
         " of " + std::to_string(access.bytes) + " bytes at " +
         (access.place.empty() ? locate(access.pc) : access.place);
}

std::string in_words(const Mark& mark) {
  std::string text = mark.pc != 0 ? "at " + locate(mark.pc) : "by an asynchronous copy";
  if (mark.several_blocks) return text + " by several blocks";
  if (mark.block != execution().block_serial) return text + " by another block";
  if (mark.warp == kManyWarps) return text + " by several warps";
  if (mark.lane == kManyLanes)
    return text + " by several lanes of warp " + std::to_string(mark.warp);
  return text + " by thread " + std::to_string(mark.warp * 32 + mark.lane) + " of the block";
}

bool is_before(const Mark& mark, const Thread& self) {
  if (mark.several_blocks || mark.block != execution().block_serial) return false;
  if (mark.barriers != self.barriers) return true;
  if (mark.warp != self.warp) return false;
  return mark.warp_barriers != self.warp_barriers || mark.lane == self.lane;
}

bool is_current(const Mark& mark, bool shared) {
  const Execution& e = execution();
  return shared ? mark.block == e.block_serial : mark.block >= e.first_block_serial;
}

Mark mark_of(const Thread& self, std::uint32_t pc) {
  return {execution().block_serial, pc, self.barriers, self.warp_barriers, std::uint16_t(self.warp),
          std::uint8_t(self.lane)};
}

void note_read(Mark& mark, const Thread& self, const Access& access) {
  const Mark mine = mark_of(self, access.pc);
  if (!is_current(mark, access.shared)) {
    mark = mine;
  } else if (mark.several_blocks || mark.block != mine.block) {
    mark = mine;
    mark.several_blocks = true;
  } else if (mark.barriers != mine.barriers) {
    mark = mine;
  } else if (mark.warp != mine.warp) {
    mark.warp = kManyWarps;
  } else if (mark.warp_barriers != mine.warp_barriers) {
    mark = mine;
  } else if (mark.lane != mine.lane) {
    mark.lane = kManyLanes;
  }
}

// False where a finding makes further ones about this access idle.
bool check_cell(Cell& cell, const Thread& self, const Access& access) {
  const char* kind = access.shared ? "race in shared memory" : "race in global memory";
  const bool written = is_current(cell.write, access.shared);
  const bool read = is_current(cell.read, access.shared);
  if (written && cell.copying && !access.write) {
    report("asynchronous copy",
           in_words(access) + " of what is being copied and was not waited for");
    return false;
  }
  if (access.shared && !access.write && !written) {
    report("uninitialised shared memory", in_words(access));
    return false;
  }
  if (written && !is_before(cell.write, self)) {
    report(kind, in_words(access) + " with no barrier after the write " + in_words(cell.write));
    return false;
  }
  if (access.write && read && !is_before(cell.read, self)) {
    report(kind, in_words(access) + " with no barrier after the read " + in_words(cell.read));
    return false;
  }
  if (access.write) {
    cell.write = mark_of(self, access.pc);
    cell.copying = false;
  } else {
    note_read(cell.read, self, access);
  }
  return true;
}

template <class Visit>
void visit_cells(Shadow& shadow, std::uintptr_t base, std::uintptr_t address, std::size_t bytes,
                 const Visit& visit) {
  std::size_t offset = address - base;
  const std::size_t end = offset + bytes;
  while (offset < end) {
    Cell& word = shadow.words[offset / 4];
    const std::size_t stop = std::min(end, offset / 4 * 4 + 4);
    if (word.parts < 0 && stop - offset < 4) {
      word.parts = std::int32_t(shadow.parts.size());
      Cell part = word;
      part.parts = -1;
      shadow.parts.push_back({part, part, part, part});
    }
    if (word.parts < 0) {
      if (!visit(word)) return;
    } else {
      for (std::size_t i = offset; i < stop; ++i)
        if (!visit(shadow.parts[std::size_t(word.parts)][i % 4])) return;
    }
    offset = stop;
  }
}

// --- the profile: bank conflicts and sectors ----------------------------------------------------

struct LoggedAccess {
  std::uint32_t pc;
  std::uint16_t bytes;
  bool write, shared;
  std::uintptr_t address;
};

struct Instruction {
  long requests = 0;  // of a warp
  long cost = 0;      // passes over the banks; 32-byte sectors
  long least = 0;     // what it would be without conflicts; if all bytes of a sector were wanted
  int bytes = 0;
  bool write = false, shared = false;
};

const char* profile_path = nullptr;
std::vector<std::vector<LoggedAccess>> logs;  // by thread
std::map<std::uint32_t, Instruction> profile;

using Request = std::array<const LoggedAccess*, 32>;

// A pass serves 32 banks: 32 lanes of 4 bytes, 16 of 8 or 8 of 16. Lanes that want the same word
// share it; distinct words of one bank take turns.
void count_shared(const Request& request, int bytes, Instruction& total) {
  const int lanes = bytes == 16 ? 8 : bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes) {
    std::array<std::set<std::uintptr_t>, 32> words;
    for (int i = first; i < first + lanes; ++i) {
      if (request[std::size_t(i)] == nullptr) continue;
      const LoggedAccess& access = *request[std::size_t(i)];
      for (std::uintptr_t word = access.address / 4;
           word <= (access.address + access.bytes - 1) / 4; ++word)
        words[word % 32].insert(word);
    }
    std::size_t passes = 0;
    for (const auto& bank : words) passes = std::max(passes, bank.size());
    total.cost += long(passes);
    total.least += passes > 0;
  }
}

void count_global(const Request& request, Instruction& total) {
  std::set<std::uintptr_t> sectors;
  std::set<std::uintptr_t> bytes;
  for (const LoggedAccess* access : request) {
    if (access == nullptr) continue;
    for (std::uintptr_t at = access->address; at < access->address + access->bytes; ++at) {
      bytes.insert(at);
      sectors.insert(at / 32);
    }
  }
  total.cost += long(sectors.size());
  total.least += long(bytes.size() + 31) / 32;
}

// The k-th access of each lane at an instruction since the last barrier are taken for one request.
void count_logged() {
  for (std::size_t first = 0; first < logs.size(); first += 32) {
    std::map<std::uint32_t, std::vector<Request>> requests;
    for (std::size_t i = first; i < std::min(first + 32, logs.size()); ++i) {
      std::unordered_map<std::uint32_t, std::size_t> seen;
      for (const LoggedAccess& access : logs[i]) {
        std::vector<Request>& all = requests[access.pc];
        const std::size_t occurrence = seen[access.pc]++;
        if (occurrence == all.size()) all.push_back(Request{});
        all[occurrence][i - first] = &access;
      }
    }
    for (const auto& [pc, all] : requests) {
      Instruction& total = profile[pc];
      for (const Request& request : all) {
        const LoggedAccess& any = **std::find_if(request.begin(), request.end(),
                                                 [](const auto* a) { return a != nullptr; });
        ++total.requests;
        total.bytes = any.bytes;
        total.write = any.write;
        total.shared = any.shared;
        if (any.shared)
          count_shared(request, any.bytes, total);
        else
          count_global(request, total);
      }
    }
  }
  for (auto& log : logs) log.clear();
}

void write_profile() {
  FILE* file = std::fopen(profile_path, "a");
  if (file == nullptr) return;
  for (const auto& [pc, total] : profile)
    std::fprintf(file,
                 "{\"space\": \"%s\", \"operation\": \"%s\", \"bytes\": %d, \"requests\": %ld, "
                 "\"cost\": %ld, \"least\": %ld, \"place\": \"%s\"}\n",
                 total.shared ? "shared" : "global", total.write ? "store" : "load", total.bytes,
                 total.requests, total.cost, total.least, locate(pc).c_str());
  std::fclose(file);
}

// --- the check of an access ---------------------------------------------------------------------

void check(const Access& access, bool may_be_misaligned) {
  Execution& e = execution();
  const bool misaligned = !may_be_misaligned && access.address % access.bytes != 0;
  const Allocation* allocation =
      access.shared ? nullptr : find_allocation(access.address, access.bytes);
  if (access.shared) {
    if (!e.shared.addressable(access.address, access.bytes))
      report_fatal("out of bounds", in_words(access) + " outside of each shared variable");
    if (shared_shadow.words.empty()) shared_shadow.words.resize(SharedMemory::kArena / 4);
  } else if (allocation == nullptr) {
    if (!access.write && is_constant(access.address, access.bytes)) return;
    report_fatal("out of bounds", in_words(access) + " outside of each allocation");
  }
  if (misaligned)
    report_fatal("misaligned access", in_words(access) + ", " +
                                          std::to_string(access.address % access.bytes) +
                                          " bytes past a multiple");
  if (profile_path != nullptr && access.counts)
    logs[std::size_t(e.thread->number)].push_back(
        {access.pc != 0 ? access.pc : instruction_at(access.place, access.write),
         std::uint16_t(access.bytes), access.write, access.shared, access.address});
  Shadow& shadow = access.shared ? shared_shadow : global_shadows[allocation->address];
  const std::uintptr_t base = access.shared ? e.shared.begin() : allocation->address;
  if (!access.shared && shadow.words.size() * 4 < allocation->bytes)
    shadow.words.assign((allocation->bytes + 3) / 4, Cell{});
  visit_cells(shadow, base, access.address, access.bytes,
              [&](Cell& cell) { return check_cell(cell, *e.thread, access); });
}

// Called by the compiler's instrumentation.
inline void on_access(void* pointer, std::size_t bytes, bool write, bool may_be_misaligned,
                      void* return_address) {
  Execution& e = execution();
  if (!e.in_kernel || e.stacks.contains(pointer)) return;
  // Launch code is instrumented too, and may be another system thread's while a kernel runs.
  if (!e.stacks.contains(__builtin_frame_address(0))) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto call = reinterpret_cast<std::uintptr_t>(e.call);
  if (address - call < e.call->size) return;  // the kernel's arguments
  const InEmulator scope;
  const auto pc =
      std::uint32_t(reinterpret_cast<std::uintptr_t>(return_address) - this_module().base);
  check({address, bytes, write, e.shared.in_arena(address), pc, {}}, may_be_misaligned);
}

}  // namespace

void check_launch_start() {
  profile_path = std::getenv("FASTCONV_EMULATOR_PROFILE");
  profile.clear();
  logs.assign(profile_path != nullptr ? execution().threads.size() : 0, {});
  // Addresses are given out again: what the shadow of an allocation says dies with it.
  std::erase_if(global_shadows, [](const auto& entry) {
    const Allocation* allocation = find_allocation(entry.first, 1);
    return allocation == nullptr || allocation->address != entry.first;
  });
}

void check_barrier() {
  if (profile_path != nullptr) count_logged();
}

void check_block_end() { check_barrier(); }

void check_launch_end() {
  if (profile_path != nullptr) write_profile();
}

void check_access(const void* address, std::size_t bytes, bool write, Location where) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  check({at, bytes, write, execution().shared.in_arena(at), 0, describe(where)}, true);
}

void check_copy_started(void* address, std::size_t bytes, Location where) {
  check_access(address, bytes, true, where);
  visit_cells(shared_shadow, execution().shared.begin(), reinterpret_cast<std::uintptr_t>(address),
              bytes, [](Cell& cell) { return cell.copying = true; });
}

void check_copy_finished(void* address, std::size_t bytes, Location where) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  check({at, bytes, true, true, 0, describe(where), false}, true);
}

}  // namespace fastconv::emulator

// What GCC and Clang call in code compiled with -fsanitize=thread. Their own runtime is not linked.
extern "C" {
#define FASTCONV_HOOKS(bytes)                                                           \
  void __tsan_read##bytes(void* p) {                                                    \
    fastconv::emulator::on_access(p, bytes, false, false, __builtin_return_address(0)); \
  }                                                                                     \
  void __tsan_write##bytes(void* p) {                                                   \
    fastconv::emulator::on_access(p, bytes, true, false, __builtin_return_address(0));  \
  }                                                                                     \
  void __tsan_unaligned_read##bytes(void* p) {                                          \
    fastconv::emulator::on_access(p, bytes, false, false, __builtin_return_address(0)); \
  }                                                                                     \
  void __tsan_unaligned_write##bytes(void* p) {                                         \
    fastconv::emulator::on_access(p, bytes, true, false, __builtin_return_address(0));  \
  }
FASTCONV_HOOKS(1)
FASTCONV_HOOKS(2)
FASTCONV_HOOKS(4)
FASTCONV_HOOKS(8)
FASTCONV_HOOKS(16)
void __tsan_read_range(void* p, std::size_t bytes) {
  fastconv::emulator::on_access(p, bytes, false, true, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
  fastconv::emulator::on_access(p, bytes, true, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of function-local statics in host code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
}
