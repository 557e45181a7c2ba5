#include "core/cpu_limits.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <thread>
#include <vector>

namespace fastconv {
namespace {

using std::int64_t;

#if defined(__linux__)

std::optional<std::string> first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

// CPUs, rounded up; 0 for none.
int64_t cpus_of(int64_t quota, int64_t period) {
  if (quota <= 0 || period <= 0) return 0;
  return quota / period + (quota % period != 0);
}

// The limit of one cgroup's own files.
int64_t own_limit(const std::string& directory, bool v2) {
  int64_t quota = 0, period = 0;
  if (v2) {
    // "max 100000" or "150000 100000"
    std::istringstream line(first_line(directory + "/cpu.max").value_or(""));
    if (!(line >> quota >> period)) return 0;
  } else {
    std::istringstream quota_line(first_line(directory + "/cpu.cfs_quota_us").value_or(""));
    std::istringstream period_line(first_line(directory + "/cpu.cfs_period_us").value_or(""));
    if (!(quota_line >> quota) || !(period_line >> period)) return 0;  // -1: none
  }
  return cpus_of(quota, period);
}

// The path of this process's cgroup in the hierarchy of v2, or in that of v1's controller `cpu`.
std::optional<std::string> cgroup_path(const std::string& root, bool v2) {
  // hierarchy:controllers:path
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    if (first == std::string::npos) continue;
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    if (v2 ? controllers == ",," : controllers.find(",cpu,") != std::string::npos) {
      return line.substr(second + 1);
    }
  }
  return std::nullopt;
}

// The kernel writes blanks and backslashes in paths as three octal digits.
std::string unescape(const std::string& text) {
  std::string out;
  const auto octal = [&](std::size_t i) { return text[i] >= '0' && text[i] <= '7'; };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size() && octal(i + 1) && octal(i + 2) && octal(i + 3)) {
      out += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                               (text[i + 3] - '0'));
      i += 3;
    } else {
      out += text[i];
    }
  }
  return out;
}

struct Mount {
  bool v2;
  std::string cgroup;  // the one that lies at `point`
  std::string point;
};

std::vector<Mount> cgroup_mounts(const std::string& root) {
  // id parent device ROOT POINT options tags... - TYPE source OPTIONS
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream before(line.substr(0, dash)), behind(line.substr(dash + 3));
    std::string id, parent, device, cgroup, point, type, source, options;
    if (!(before >> id >> parent >> device >> cgroup >> point) || !(behind >> type >> source)) {
      continue;
    }
    behind >> options;
    const bool v2 = type == "cgroup2";
    const bool v1 = type == "cgroup" && ("," + options + ",").find(",cpu,") != std::string::npos;
    if (v1 || v2) mounts.push_back({v2, unescape(cgroup), unescape(point)});
  }
  return mounts;
}

// The least limit from the process's own cgroup up to the one that is mounted: a child's time is its
// ancestors' too.
int64_t least_limit(const std::string& root, const Mount& mount, const std::string& path) {
  // In a container, often only the container's own cgroup is mounted.
  std::string below = path;
  if (mount.cgroup != "/") {
    const bool within = path.compare(0, mount.cgroup.size(), mount.cgroup) == 0;
    below = within ? path.substr(mount.cgroup.size()) : "";
  }
  if (below.find("/..") != std::string::npos) below.clear();  // outside of what is mounted
  const std::string mounted = root + mount.point;
  int64_t least = 0;
  for (;;) {
    while (!below.empty() && below.back() == '/') below.pop_back();
    const int64_t own = own_limit(mounted + below, mount.v2);
    if (own > 0 && (least == 0 || own < least)) least = own;
    if (below.empty()) return least;
    const std::size_t slash = below.rfind('/');
    below.resize(slash == std::string::npos ? 0 : slash);
  }
}

#endif

int affinity_count() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max<int>(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

}  // namespace

int cgroup_cpus(const std::string& root) {
  int64_t least = 0;
#if defined(__linux__)
  for (const Mount& mount : cgroup_mounts(root)) {
    const auto path = cgroup_path(root, mount.v2);
    if (!path) continue;
    const int64_t limit = least_limit(root, mount, *path);
    if (limit > 0 && (least == 0 || limit < least)) least = limit;
  }
#else
  (void)root;
#endif
  return static_cast<int>(std::min<int64_t>(least, std::numeric_limits<int>::max()));
}

int usable_cpus() {
  const int granted = cgroup_cpus();
  return granted > 0 ? std::min(affinity_count(), granted) : affinity_count();
}

}  // namespace fastconv
