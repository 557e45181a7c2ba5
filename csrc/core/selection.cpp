#include "core/selection.hpp"

#include <pthread.h>

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "core/environment.hpp"
#include "core/error.hpp"
#include "core/thread_pool.hpp"
#include "cpu/bf16_kernels.hpp"
#include "cpu/kernels.hpp"
#include "cpu/probe.hpp"

namespace fastconv {
namespace {

// Both settings and their generation. Readers of the hot path see the generation alone. Leaked, as is
// all that is locked here: calls may still run while static objects are destroyed.
std::mutex& g_mutex = *new std::mutex;
std::string& g_preferred = *new std::string("auto");
Accuracy g_accuracy = Accuracy::standard;
std::atomic<std::uint64_t> g_generation{0};  // 0: the environment has not been read

// The rates that multiply_adds_a_second has measured.
std::mutex& g_rates_mutex = *new std::mutex;
std::map<std::pair<Isa, int>, double>& g_rates = *new std::map<std::pair<Isa, int>, double>;

// A child forked while another thread holds one of them would find it locked for ever.
[[maybe_unused]] const int g_registered = pthread_atfork(
    [] {
      g_rates_mutex.lock();
      g_mutex.lock();
    },
    [] {
      g_mutex.unlock();
      g_rates_mutex.unlock();
    },
    [] {
      g_mutex.unlock();
      g_rates_mutex.unlock();
    });

Accuracy parse_accuracy(const std::string& name, const char* source) {
  for (Accuracy accuracy : {Accuracy::strict, Accuracy::standard, Accuracy::fast}) {
    if (name == accuracy_name(accuracy)) return accuracy;
  }
  throw InvalidArgument(std::string(source) +
                        " must be one of 'strict', 'default', 'fast'. Received: " + source + "='" +
                        name + "'");
}

std::string parse_algorithm(const std::string& name, const char* source) {
  if (name == "auto") return name;
  std::string names = "'auto'";
  for (const cpu::Conv2dAlgorithm* algorithm : cpu::kernels(current_isa()).conv2d) {
    if (name == algorithm->name) return name;
    names += ", '" + std::string(algorithm->name) + "'";
  }
  for (const cpu::Bf16Algorithm* algorithm : cpu::bf16_algorithms()) {
    if (name == algorithm->name) return name;
    names += ", '" + std::string(algorithm->name) + "'";
  }
  throw InvalidArgument(std::string(source) + " must be one of " + names + ". Received: " + source +
                        "='" + name + "'");
}

// With g_mutex held. Throws, and stays unread, where a variable names nothing known.
void read_environment() {
  if (g_generation.load(std::memory_order_relaxed) != 0) return;
  const Accuracy accuracy =
      parse_accuracy(from_environment("FASTCONV_ACCURACY", "default"), "FASTCONV_ACCURACY");
  const std::string preferred =
      parse_algorithm(from_environment("FASTCONV_ALGORITHM", "auto"), "FASTCONV_ALGORITHM");
  g_accuracy = accuracy;
  g_preferred = preferred;
  g_generation.store(1, std::memory_order_release);
}

// Multiply-adds a second that num_threads() threads do at best, measured once for each number of
// threads and instruction set.
double multiply_adds_a_second(Isa isa) {
  const std::lock_guard lock(g_rates_mutex);
  double& rate = g_rates[{isa, num_threads()}];
  constexpr double kSeconds = 0.01;
  if (rate == 0) rate = probe::flops(kSeconds) / 2;
  return rate;
}

}  // namespace

const char* direction_name(Direction direction) {
  switch (direction) {
    case Direction::fprop: return "fprop";
    case Direction::dgrad: return "dgrad";
    case Direction::wgrad: return "wgrad";
  }
  return "unknown";
}

const char* accuracy_name(Accuracy accuracy) {
  switch (accuracy) {
    case Accuracy::strict: return "strict";
    case Accuracy::standard: return "default";
    case Accuracy::fast: return "fast";
  }
  return "unknown";
}

std::uint64_t selection_settings() {
  if (const std::uint64_t generation = g_generation.load(std::memory_order_acquire)) {
    return generation;
  }
  const std::lock_guard lock(g_mutex);
  read_environment();
  return g_generation.load(std::memory_order_relaxed);
}

Accuracy current_accuracy() {
  const std::lock_guard lock(g_mutex);
  read_environment();
  return g_accuracy;
}

void set_accuracy(const std::string& name) {
  const Accuracy accuracy = parse_accuracy(name, "accuracy");
  const std::lock_guard lock(g_mutex);
  read_environment();
  g_accuracy = accuracy;
  g_generation.fetch_add(1, std::memory_order_acq_rel);
}

std::string preferred_algorithm() {
  const std::lock_guard lock(g_mutex);
  read_environment();
  return g_preferred;
}

void set_preferred_algorithm(const std::string& name) {
  const std::string preferred = parse_algorithm(name, "algorithm");
  const std::lock_guard lock(g_mutex);
  read_environment();
  g_preferred = preferred;
  g_generation.fetch_add(1, std::memory_order_acq_rel);
}

Explanation explain(const Conv2dProblem& p, Direction direction) {
  const Isa isa = current_isa();
  Explanation out;
  out.flops =
      2.0 * static_cast<double>(p.y_size()) * static_cast<double>(p.r * p.s * p.c_per_group());
  const double rate = multiply_adds_a_second(isa);
  const bool strict = current_accuracy() == Accuracy::strict;
  const auto add = [&](const auto& algorithm, const Conv2dProblem& problem, bool is_chosen,
                       bool may_be_chosen = true) {
    if (!algorithm.serves(problem, direction)) return;
    const cpu::Estimate estimate = algorithm.estimate(problem, direction);
    const double seconds = estimate.multiply_adds / rate;
    out.candidates.push_back(
        {algorithm.name, seconds, may_be_chosen && (!strict || estimate.relative_error == 0)});
    if (!is_chosen) return;
    out.algorithm = algorithm.name;
    out.blocking = algorithm.blocking(problem, direction);
    out.workspace_bytes = estimate.workspace_bytes;
    out.predicted_seconds = seconds;
  };
  const cpu::Bf16Algorithm* const of_bf16 = cpu::choose_bf16(p, direction);
  if (p.dtype == DataType::bfloat16) {
    for (const cpu::Bf16Algorithm* algorithm : cpu::bf16_algorithms()) {
      add(*algorithm, p, algorithm == of_bf16, !algorithm->is_for_its_name);
    }
  }
  const Conv2dProblem computed = of_float32(p);
  const cpu::Conv2dAlgorithm* const chosen = of_bf16 ? nullptr : &cpu::choose(computed, direction);
  for (const cpu::Conv2dAlgorithm* algorithm : cpu::kernels(isa).conv2d) {
    add(*algorithm, computed, algorithm == chosen);
  }
  return out;
}

}  // namespace fastconv
