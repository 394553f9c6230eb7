// The expert MLP on the CPU: one pass over tiles of rows of one expert, products by oneDNN's small-matrix kernels.
//
// Why not a product an expert: oneDNN packs an expert's weights anew in each call, which at 270 rows takes a fifth of
// the product's time, and all threads wait for each other at each of the many small operations around it. Here the
// threads pack weights straight from the fp32 parameters and take tiles (gather, product, bias and GELU, product) from
// one queue; what one stage leaves in the caches the next one finds there. Every output element is written by one job
// in one order: equal inputs give equal bits for any number of threads.
//
// Legend: R rows, M assignments in expert order, E experts, D width, H hidden width, T the products' type (float or
// bf16). An expert's rows are cut into tiles of ROWS; the last one is filled with zero rows up to a multiple of FILL,
// so that few kernels exist. F = all tiles' rows.

#include "pack.h"
#include "queue.h"

namespace {

constexpr int64_t SLICE = 128;  // rows of a weight gradient that are one job

// h (F, H) = x W1' + b1 and y (M, D) = gelu(h) W2' + b2. y null: h alone; h null: it is not kept.
template <class T>
void forward(int64_t e, int64_t d, int64_t hidden, const int64_t* counts, const int64_t* token, const T* x,
             const float* w1, const float* b1, const float* w2, const float* b2, T* h, T* y) {
  const Tiles tiles(counts, e);
  const int64_t places = ring(e);
  Packed<T> first(places, d, hidden), second(places, hidden, d);
  const int64_t of_first = first.blocks(), of_second = y ? second.blocks() : 0;
  const auto tile = [&](const Tile& t) {
    thread_local Scratch<T> rows, active, own;
    thread_local Scratch<float> sums;
    T *in = rows.get(ROWS * d), *after = active.get(ROWS * hidden);
    T* keep = h ? h + t.at * hidden : own.get(ROWS * hidden);
    float* sum = sums.get(ROWS * COLS);
    gather(x, token, t, d, in);
    for (int64_t b = 0; b < of_first; ++b) {
      const int64_t n = first.width(b), n0 = b * COLS;
      product(t.filled, n, d, d, n, n, false, in, first.block(t.expert, b), sum);
      for (int64_t r = 0; r < t.filled; ++r) {
        const float *from = sum + r * n, *bias = b1 + t.expert * hidden + n0;
        T *pre = keep + r * hidden + n0, *post = after + r * hidden + n0;
        for (int64_t j = 0; j < n; ++j) {
          float below, bell;
          narrow(from[j] + bias[j], pre[j]);
          normal(wide(pre[j]), below, bell);
          narrow(wide(pre[j]) * below, post[j]);
        }
      }
    }
    for (int64_t b = 0; b < of_second; ++b) {
      const int64_t n = second.width(b), n0 = b * COLS;
      product(t.filled, n, hidden, hidden, n, n, false, after, second.block(t.expert, b), sum);
      for (int64_t r = 0; r < t.rows; ++r) {
        const float *from = sum + r * n, *bias = b2 + t.expert * d + n0;
        T* to = y + (t.begin + r) * d + n0;
        for (int64_t j = 0; j < n; ++j) narrow(from[j] + bias[j], to[j]);
      }
    }
  };
  const auto count = [&](int stage, int64_t id) {
    return stage ? tiles.of(id) : counts[id] ? of_first + of_second : 0;
  };
  run<T>(2, e, count, [&](int stage, int64_t id, int64_t i) {
    if (stage)
      tile(tiles.first(id)[i]);
    else if (i < of_first)
      first.from_transposed(w1, id, i);
    else
      second.from_transposed(w2, id, i - of_first);
  });
}

// Rows o0 .. o0 + SLICE of an expert's weight gradient (out, in): the sum over its tiles of left' right, and of left'
// for the bias; 0 where nobody came.
template <class T>
void weight_gradient(const Tiles& tiles, int64_t id, int64_t out, int64_t in, int64_t o0, const T* left, const T* right,
                     float* weights, float* biases) {
  const Tile *begin = tiles.first(id), *end = begin + tiles.of(id);
  const int64_t o = std::min(SLICE, out - o0);
  float *weight = weights + (id * out + o0) * in, *bias = biases + id * out + o0;
  if (begin == end) std::fill(weight, weight + o * in, 0.0f);
  for (int64_t n0 = 0; n0 < in; n0 += COLS)
    for (const Tile* t = begin; t < end; ++t)
      product(o, std::min(COLS, in - n0), t->filled, t->filled, in, in, t != begin,
              left + t->at * out + o0 * t->filled, right + t->at * in + n0 * PAIR<T>, weight + n0);
  for (int64_t i = 0; i < o; ++i) {
    bias[i] = 0.0f;
    for (const Tile* t = begin; t < end; ++t) {
      const T* row = left + t->at * out + (o0 + i) * t->filled;
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int64_t r = 0; r < t->filled; ++r) part += wide(row[r]);
      bias[i] += part;
    }
  }
}

// gx (M, D), gp (M,) and the parameters' gradients from g (R, D), p (M,), x and h.
template <class T>
void backward(int64_t e, int64_t d, int64_t hidden, const int64_t* counts, const int64_t* token, const T* x, const T* g,
              const float* p, const float* w1, const float* w2, const T* h, T* gx, float* gp, float* gw1, float* gb1,
              float* gw2, float* gb2) {
  const Tiles tiles(counts, e);
  const int64_t places = ring(e);
  Packed<T> second(places, d, hidden), first(places, hidden, d);
  const int64_t of_second = second.blocks(), of_first = first.blocks();
  // Operands of the weight gradients, tile by tile: A' of g and of dL/dh, B of x and of gelu(h).
  const int64_t f = tiles.filled;
  Buffer<T> left2(f * d), left1(f * hidden), right1(f * d), right2(f * hidden);
  const auto tile = [&](const Tile& t) {
    thread_local Scratch<T> rows, active, down, packed;
    thread_local Scratch<float> sums;
    T *in = rows.get(ROWS * d), *after = active.get(ROWS * hidden), *gh = down.get(ROWS * hidden);
    T* pairs = packed.get(ROWS * std::max(d, hidden));
    float *sum = sums.get(ROWS * COLS), dots[ROWS] = {}, scale[ROWS] = {};
    std::copy(p + t.begin, p + t.begin + t.rows, scale);
    gather(x, token, t, d, in);
    pack_rows(in, d, t.filled, d, right1.get() + t.at * d);
    gather(g, token, t, d, in);
    for (int64_t b = 0; b < of_second; ++b) {
      const int64_t n = second.width(b), n0 = b * COLS;
      product(t.filled, n, d, d, n, n, false, in, second.block(t.expert, b), sum);
      for (int64_t r = 0; r < t.filled; ++r) {
        const float* da = sum + r * n;
        const T* pre = h + (t.at + r) * hidden + n0;
        T *a = after + r * hidden + n0, *to = gh + r * hidden + n0;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < n; ++j) {
          float below, bell;
          const float v = wide(pre[j]);
          normal(v, below, bell);
          narrow(v * below, a[j]);
          dot += da[j] * wide(a[j]);
          narrow(scale[r] * da[j] * (below + v * bell * 0.39894228f), to[j]);
        }
        dots[r] += dot;
      }
    }
    std::copy(dots, dots + t.rows, gp + t.begin);
    for (int64_t b = 0; b < of_first; ++b) {
      const int64_t n = first.width(b), n0 = b * COLS;
      product(t.filled, n, hidden, hidden, n, n, false, gh, first.block(t.expert, b), sum);
      for (int64_t r = 0; r < t.rows; ++r) narrow(sum + r * n, n, gx + (t.begin + r) * d + n0);
    }
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t j = 0; j < d; ++j) narrow(scale[r] * wide(in[r * d + j]), in[r * d + j]);
    pack_rows(in, d, t.filled, d, pairs);
    transpose_packed(pairs, t.filled, d, left2.get() + t.at * d);
    pack_rows(gh, hidden, t.filled, hidden, pairs);
    transpose_packed(pairs, t.filled, hidden, left1.get() + t.at * hidden);
    pack_rows(after, hidden, t.filled, hidden, right2.get() + t.at * hidden);
  };
  const int64_t slices1 = (hidden + SLICE - 1) / SLICE, slices2 = (d + SLICE - 1) / SLICE;
  const auto count = [&](int stage, int64_t id) {
    return stage == 2 ? slices1 + slices2 : stage == 1 ? tiles.of(id) : counts[id] ? of_second + of_first : 0;
  };
  run<T>(3, e, count, [&](int stage, int64_t id, int64_t i) {
    if (stage == 0)
      i < of_second ? second.from_rows(w2, id, i) : first.from_rows(w1, id, i - of_second);
    else if (stage == 1)
      tile(tiles.first(id)[i]);
    else if (i < slices1)
      weight_gradient(tiles, id, hidden, d, i * SLICE, left1.get(), right1.get(), gw1, gb1);
    else
      weight_gradient(tiles, id, d, hidden, (i - slices1) * SLICE, left2.get(), right2.get(), gw2, gb2);
  });
}

// out (R, D) = sum over j < k of weights[r, j] values[inverse[r, j]] in fp32; weights null: 1
template <class T>
void combine(int64_t rows, int64_t k, int64_t d, const T* values, const int64_t* inverse, const float* weights,
             float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * d;
    std::fill(to, to + d, 0.0f);
    for (int64_t j = 0; j < k; ++j) {
      const float weight = weights ? weights[r * k + j] : 1.0f;
      const T* from = values + inverse[r * k + j] * d;
      for (int64_t i = 0; i < d; ++i) to[i] += weight * wide(from[i]);
    }
  }
}

// Whether this processor and this torch multiply in T: the unit matrix times 0, 1, 2, ... is looked at.
template <class T>
int works() {
  try {
    T a[2 * 2] = {}, b[2 * 16] = {};
    float c[2 * 16];
    for (T* each : {a, a + 3}) narrow(1.0f, *each);
    for (int i = 0; i < 32; ++i) narrow(float(i), b[i]);
    product(2, 16, 2, 2, 16, 16, false, a, b, c);
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
    return c[0] == 0.0f && c[15] == 15.0f * PAIR<T> && c[16] == (PAIR<T> == 2 ? 1.0f : 16.0f);
  } catch (...) {
    return 0;
  }
}

template <class Call>
int guarded(Call call) {  // 0, or 1 where something was thrown: no memory, or a product that oneDNN refuses
  try {
    call();
    return 0;
  } catch (...) {
    return 1;
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                              \
  extern "C" int moe_forward_##NAME(int64_t e, int64_t d, int64_t hidden, const int64_t* counts,                     \
                                    const int64_t* token, const T* x, const float* w1, const float* b1,              \
                                    const float* w2, const float* b2, T* h, T* y) {                                  \
    return guarded([&] { forward<T>(e, d, hidden, counts, token, x, w1, b1, w2, b2, h, y); });                       \
  }                                                                                                                  \
  extern "C" int moe_backward_##NAME(int64_t e, int64_t d, int64_t hidden, const int64_t* counts,                    \
                                     const int64_t* token, const T* x, const T* g, const float* p, const float* w1,  \
                                     const float* w2, const T* h, T* gx, float* gp, float* gw1, float* gb1,          \
                                     float* gw2, float* gb2) {                                                       \
    return guarded([&] {                                                                                             \
      backward<T>(e, d, hidden, counts, token, x, g, p, w1, w2, h, gx, gp, gw1, gb1, gw2, gb2);                      \
    });                                                                                                              \
  }                                                                                                                  \
  extern "C" int moe_combine_##NAME(int64_t rows, int64_t k, int64_t d, const T* values, const int64_t* inverse,     \
                                    const float* weights, float* out) {                                              \
    return guarded([&] { combine<T>(rows, k, d, values, inverse, weights, out); });                                  \
  }                                                                                                                  \
  extern "C" int moe_works_##NAME() { return works<T>(); }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
