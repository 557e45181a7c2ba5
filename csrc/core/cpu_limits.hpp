// How many CPUs this process may keep busy: what the default number of threads is.
#pragma once

#include <string>

#include "core/export.hpp"

namespace fastconv {

// CPUs of the calling thread's affinity mask (sched_setaffinity, taskset, cpusets), no more than
// cgroup_cpus(); at least 1.
FASTCONV_API int usable_cpus();

// The CPU time that this process's cgroup and those above it are granted (cpu.max of cgroup v2,
// cpu.cfs_quota_us of v1), in CPUs, rounded up: with 2.5 CPUs' time, three threads finish sooner than
// two, though each waits at times. 0 where there is no limit or none can be read. `root` stands
// before every path that is read, /proc/self and the cgroups' mounts; for tests.
FASTCONV_API int cgroup_cpus(const std::string& root = "");

}  // namespace fastconv
