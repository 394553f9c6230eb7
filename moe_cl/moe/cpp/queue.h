// The rows of each expert in tiles, and the order in which the threads do the work.
#pragma once

#include <omp.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "types.h"

namespace {

constexpr int64_t ROWS = 64, FILL = 8;

struct Tile {
  int64_t expert, begin, rows, at, filled;  // begin: of its rows among M; at: among F
};

class Tiles {
  std::vector<Tile> all;
  std::vector<int64_t> starts;  // (E + 1,) first tile of each expert

 public:
  int64_t filled = 0;  // F
  Tiles(const int64_t* counts, int64_t experts) : starts(1, 0) {
    int64_t begin = 0;
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t left = counts[e]; left > 0; left -= ROWS) {
        const int64_t rows = std::min(left, ROWS), whole = (rows + FILL - 1) / FILL * FILL;
        all.push_back({e, begin, rows, filled, whole});
        begin += rows;
        filled += whole;
      }
      starts.push_back(all.size());
    }
  }
  const Tile* first(int64_t expert) const { return all.data() + starts[expert]; }
  int64_t of(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

template <class T>
void gather(const T* source, const int64_t* rows, const Tile& t, int64_t d, T* out) {
  for (int64_t r = 0; r < t.rows; ++r) std::memcpy(out + r * d, source + rows[t.begin + r] * d, d * sizeof(T));
  std::memset(static_cast<void*>(out + t.rows * d), 0, (t.filled - t.rows) * d * sizeof(T));
}

// How many experts' packed weights there is room for: those in work and a few ahead.
inline int64_t ring(int64_t experts) { return std::min<int64_t>(experts, 4 + omp_get_max_threads()); }

// What the threads do, in this order: stage s of expert i comes with stage 0 of expert i + s, so that what a stage
// leaves is still in the caches for the next one, and nobody waits for all others. ``count(s, e)``: jobs of a stage.
// Stage 0 of an expert fills the place in the ring that stage 1 of earlier ones has read. What a job throws is thrown
// again when all threads have ended; the jobs after it are left out.
template <class T, class Count, class Work>
void run(int stages, int64_t experts, Count count, Work work) {
  struct Job {
    int stage;
    int64_t expert, index;
  };
  std::vector<Job> jobs;
  std::vector<std::atomic<int64_t>> open(stages * experts);
  for (int64_t step = 0; step < experts + stages - 1; ++step)
    for (int s = 0; s < stages; ++s) {
      const int64_t e = step - s;
      if (e < 0 || e >= experts) continue;
      open[s * experts + e] = count(s, e);
      for (int64_t i = 0; i < count(s, e); ++i) jobs.push_back({s, e, i});
    }
  const int64_t places = ring(experts);
  const auto done = [&](int stage, int64_t e) {  // whoever it waits for is earlier in the queue
    while (e >= 0 && open[stage * experts + e].load(std::memory_order_acquire) > 0) std::this_thread::yield();
  };
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
#pragma omp parallel
  {
    for (int64_t j; (j = next++) < int64_t(jobs.size());) {
      const Job& job = jobs[j];
      if (job.stage) done(job.stage - 1, job.expert);
      // All earlier experts of the place: the one before may have no rows, and so nothing to wait for.
      for (int64_t e = job.expert - places; !job.stage && e >= 0; e -= places) done(1, e);
      try {
        if (!failed) work(job.stage, job.expert, job.index);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
      open[job.stage * experts + job.expert].fetch_sub(1, std::memory_order_release);
    }
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace
