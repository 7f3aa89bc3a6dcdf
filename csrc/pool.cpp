// Persistent threads that share the chunks of one task at a time. Idle threads spin for some microseconds, then sleep.
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "internal.h"

namespace {

constexpr int32_t most_threads = 256;
constexpr int64_t spin_nanoseconds = 20000;

void wait_on(std::atomic<uint32_t> &word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t> &word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

struct Pool {
  pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // of the task that runs
  std::atomic<int32_t> threads{1};
  int32_t started = 0;  // workers, besides the caller
  std::atomic<uint32_t> round{0}, sleepers{0};
  std::atomic<bool> open{false};  // whether the task of this round still takes workers
  std::atomic<uint32_t> active{0};
  std::atomic<int32_t> places{0};  // workers that may still join
  std::atomic<int64_t> next{0};
  void (*task)(void *, int64_t) = nullptr;
  void *context = nullptr;
  int64_t chunks = 0;
};

Pool pool;
thread_local bool inside = false;  // a task runs on this thread

void take_chunks() {
  for (int64_t chunk; (chunk = pool.next.fetch_add(1)) < pool.chunks;) pool.task(pool.context, chunk);
}

void *work(void *) {
  inside = true;
  uint32_t seen = 0;
  for (;;) {
    int64_t until = now() + spin_nanoseconds;
    while (pool.round.load() == seen) {
      for (int i = 0; i < 64 && pool.round.load() == seen; ++i) __builtin_ia32_pause();
      if (pool.round.load() != seen || now() < until) continue;
      pool.sleepers.fetch_add(1);
      wait_on(pool.round, seen);
      pool.sleepers.fetch_sub(1);
    }
    seen = pool.round.load();
    // Announced before looking whether the task is open: its owner closes it before waiting for who is announced.
    pool.active.fetch_add(1);
    if (pool.open.load() && pool.places.fetch_sub(1) > 0) take_chunks();
    if (pool.active.fetch_sub(1) == 1) wake_all(pool.active);
  }
  return nullptr;
}

void start_workers(int32_t count) {
  for (; pool.started < count; ++pool.started) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int failed = pthread_create(&thread, &attributes, work, nullptr);
    pthread_attr_destroy(&attributes);
    if (failed) return;  // the caller does what workers would have done
  }
}

// A child of fork has this thread only: no workers, no task, nobody's locks.
void forget_workers() {
  pthread_mutex_init(&pool.owner, nullptr);
  pool.started = 0;
  pool.active.store(0);
  pool.sleepers.store(0);
  pool.open.store(false);
  inside = false;
}

struct Fork {
  Fork() { pthread_atfork(nullptr, nullptr, forget_workers); }
} fork_handler;

}  // namespace

extern "C" int32_t rarefy_threads(int32_t count) {
  int32_t before = pool.threads.load();
  if (count > 0) pool.threads.store(count < most_threads ? count : most_threads);
  return before;
}

extern "C" void rarefy_parallel(void (*task)(void *, int64_t), void *context, int64_t chunks) {
  int64_t helpers = pool.threads.load() - 1;
  if (helpers > chunks - 1) helpers = chunks - 1;
  if (helpers < 1 || inside || pthread_mutex_trylock(&pool.owner) != 0) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
    return;
  }
  start_workers(int32_t(helpers));
  pool.task = task, pool.context = context, pool.chunks = chunks;
  pool.next.store(0);
  pool.places.store(int32_t(helpers));
  pool.open.store(true);
  pool.round.fetch_add(1);
  if (pool.sleepers.load()) wake_all(pool.round);
  inside = true;
  take_chunks();
  inside = false;
  pool.open.store(false);
  int64_t until = now() + spin_nanoseconds;
  for (uint32_t busy; (busy = pool.active.load()) != 0;) {
    if (now() < until) __builtin_ia32_pause();
    else wait_on(pool.active, busy);
  }
  pthread_mutex_unlock(&pool.owner);
}
