// Operands as oneDNN's kernels read them. B in bf16 holds pairs of a column's entries side by side: [k/2][n][2].
#pragma once

#include "types.h"

namespace {

constexpr int64_t COLS = 128;  // most columns of B in one product
constexpr int64_t LINE = 384;  // 32-bit words of a row that are packed at a time: sixteen such rows stay in L1

// out (C, R) = in (R, C)', 32 bits an entry
void transpose(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t cols, uint32_t* out, int64_t ld_out) {
  int64_t r0 = 0;
#ifdef __AVX512F__
  for (; r0 + 16 <= rows; r0 += 16) {
    int64_t c0 = 0;
    for (; c0 + 16 <= cols; c0 += 16) {
      __m512i a[16], b[16];
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + (r0 + i) * ld_in + c0);
      for (int i = 0; i < 8; ++i) {  // pairs of rows, 32-bit entries
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
      }
      for (int i = 0; i < 4; ++i)  // fours of rows: a[4i + j] holds columns j, 4 + j, 8 + j, 12 + j
        for (int j = 0; j < 2; ++j) {
          a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
          a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
        }
      for (int j = 0; j < 4; ++j) {  // all sixteen rows, by 128 bits
        const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        b[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        b[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
      }
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c0 + i) * ld_out + r0, b[i]);
    }
    for (; c0 < cols; ++c0)
      for (int64_t i = 0; i < 16; ++i) out[c0 * ld_out + r0 + i] = in[(r0 + i) * ld_in + c0];
  }
#endif
  for (; r0 < rows; ++r0)
    for (int64_t c = 0; c < cols; ++c) out[c * ld_out + r0] = in[r0 * ld_in + c];
}

// B = W' of W (N, K) fp32, columns n0 .. n0 + n of it: out [K / PAIR][n][PAIR]. Sixteen rows of W, which lie behind
// each other, are read in one go, as the memory likes it.
template <class T>
void pack_transposed(const float* w, int64_t k, int64_t n, T* out) {
  constexpr int64_t CHUNK = LINE * PAIR<T>;
  uint32_t part[16 * LINE];
  for (int64_t j0 = 0; j0 < n; j0 += 16)
    for (int64_t k0 = 0; k0 < k; k0 += CHUNK) {
      const int64_t size = std::min(CHUNK, k - k0), rows = std::min<int64_t>(16, n - j0);
      for (int64_t j = 0; j < rows; ++j)
        narrow(w + (j0 + j) * k + k0, size, reinterpret_cast<T*>(part + j * LINE));
      transpose(part, LINE, rows, size / PAIR<T>, reinterpret_cast<uint32_t*>(out + k0 * n) + j0, n);
    }
}

// B = V of V (K, N), ld apart: out [K / PAIR][n][PAIR]
template <class S, class T>
void pack_rows(const S* v, int64_t ld, int64_t k, int64_t n, T* out) {
  for (int64_t i = 0; i < k; i += PAIR<T>) {
    const S* row = v + i * ld;
    if constexpr (PAIR<T> == 1) {
      std::memcpy(out + i * n, row, n * sizeof(T));
    } else {
      uint32_t* to = reinterpret_cast<uint32_t*>(out + i * n);
      for (int64_t j = 0; j < n; ++j) to[j] = bits(row[j]) | bits(row[ld + j]) << 16;
    }
  }
}

// A' of rows already packed as B: (n, k) of [k / PAIR][n][PAIR]
template <class T>
void transpose_packed(const T* packed, int64_t k, int64_t n, T* out) {
  transpose(reinterpret_cast<const uint32_t*>(packed), n, k / PAIR<T>, n, reinterpret_cast<uint32_t*>(out),
            k / PAIR<T>);
}

template <class T>
struct Packed {  // the B operands of the experts in the ring, by blocks of COLS columns
  int64_t places, k, n;
  Buffer<T> data;
  Packed(int64_t places, int64_t k, int64_t n) : places(places), k(k), n(n), data(places * k * n) {}
  int64_t blocks() const { return (n + COLS - 1) / COLS; }
  int64_t width(int64_t block) const { return std::min(COLS, n - block * COLS); }
  T* block(int64_t expert, int64_t block) { return data.get() + expert % places * k * n + block * COLS * k; }

  void from_transposed(const float* w, int64_t e, int64_t b) {  // W (E, N, K)
    pack_transposed(w + e * k * n + b * COLS * k, k, width(b), block(e, b));
  }
  void from_rows(const float* w, int64_t e, int64_t b) {  // W (E, K, N)
    pack_rows(w + e * k * n + b * COLS, n, k, width(b), block(e, b));
  }
};

}  // namespace
