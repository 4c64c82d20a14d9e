// Products of rows with packed weights on a CPU: tiles whose every output is summed in one fixed order.
//
// One output has one SIMD lane, and rows share a tile only to read weights once: no arithmetic crosses from one row to
// another, so that neither the number of rows nor their neighbours can change a bit. Build without -ffast-math and with
// -ffp-contract=off; a fused multiply-add is written where it is meant. LITCHI_PLAIN leaves out every intrinsic but
// that of a multiply-add.
//
// A word is 32 bits: one fp32, a pair of bf16 or of int16, or four int8: what one step of a sum takes from a row.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16x __attribute__((vector_size(64)));
typedef uint32_t u16x __attribute__((vector_size(64)));
typedef float v16_loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef u16x u16_loose __attribute__((aligned(4), may_alias));
typedef uint32_t word;

constexpr int BLOCK = 32;        // outputs of a panel; keys of a block; inner values that share a scale
constexpr int ROWS = 12;         // rows of a tile: 24 accumulators of 32 registers
constexpr int QUANTISED_ROWS = 6;  // of a quantised tile, which keeps integers and sums
constexpr int SPINS = 2000;      // of a thread that waits, some tens of microseconds, before it lets others run
constexpr int PAD = 16;          // words behind each row, so that rows do not fall into one set of the cache
enum Kind { F32, BF16, INT8, INT4, W8A8, W4A8 };  // the last two round rows to 8 bits as well

#define INLINE static inline __attribute__((always_inline))

INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_loose*>(p); }
INLINE void store(float* p, v16 v) { *reinterpret_cast<v16_loose*>(p) = v; }
INLINE u16x bits(const void* p) { return *reinterpret_cast<const u16_loose*>(p); }
INLINE v16 all(float x) { return v16{} + x; }
INLINE u16x all_bits(word x) { return u16x{} + x; }
INLINE v16 nearest(v16 x) { return (x + 12582912.f) - 12582912.f; }  // to an integer, ties to even

INLINE void fetch(const void* at, long bytes) {  // into the second cache, before it is asked for
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 1);
}

INLINE v16 fma(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__) && !defined(LITCHI_PLAIN)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX__)  // in halves: compilers take the sixteen of the loop below one by one
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof x), std::memcpy(y, &b, sizeof y), std::memcpy(z, &c, sizeof z);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof c);
  return c;
#elif defined(__FMA__) || defined(__aarch64__)
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Sixteen pairs of bf16 with one pair.
INLINE v16 dot_pairs(v16 sum, u16x w, word x) {
#if defined(__AVX512BF16__) && !defined(LITCHI_PLAIN)
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
  sum = fma((v16)(w << 16), (v16)(all_bits(x << 16)), sum);
  return fma((v16)(w & 0xffff0000u), (v16)(all_bits(x & 0xffff0000u)), sum);
#endif
}

// Sixteen pairs of int16 with one. Integers: exact in any order.
INLINE i16x dot_integers(i16x sum, u16x w, word x) {
#if defined(__AVX512VNNI__) && !defined(LITCHI_PLAIN)
  return (i16x)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__) && !defined(LITCHI_PLAIN)
  __m256i a[2], b[2];
  std::memcpy(a, &sum, sizeof a), std::memcpy(b, &w, sizeof b);
  for (int i = 0; i < 2; ++i) a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(b[i], _mm256_set1_epi32((int)x)));
  std::memcpy(&sum, a, sizeof sum);
  return sum;
#else
  return sum + ((i16x)(w << 16) >> 16) * (int32_t)(int16_t)x + ((i16x)w >> 16) * (int32_t)(int16_t)(x >> 16);
#endif
}

// Sixteen quadruples of unsigned bytes with one of signed bytes.
INLINE i16x dot_quads(i16x sum, u16x w, word x) {
#if defined(__AVX512VNNI__) && !defined(LITCHI_PLAIN)
  return (i16x)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
  for (int byte = 0; byte < 32; byte += 8) sum += (i16x)((w >> byte) & 255u) * (int32_t)(int8_t)(x >> byte);
  return sum;
#endif
}

INLINE v16 from_half(const uint16_t* p) {
#if defined(__AVX512F__) && !defined(LITCHI_PLAIN)
  return (v16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  u16x h;
  for (int i = 0; i < 16; ++i) h[i] = p[i];
  v16 size = (v16)((h & 0x7fffu) << 13) * 0x1p112f;
  return (v16)((u16x)size | ((h & 0x8000u) << 16));
#endif
}

typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

INLINE h16 to_bf16(v16 x) {  // ties to even; what is no number stays none
#if defined(__AVX512BF16__) && !defined(LITCHI_PLAIN)
  return (h16)_mm512_cvtneps_pbh((__m512)x);
#else
  u16x u = (u16x)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : all_bits(0x7fc0u), h16);
#endif
}

template <class Join>
INLINE float across(v16 v, Join join) {  // the sixteen lanes as a fixed tree
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 x[2];
  std::memcpy(x, &v, sizeof v);
  x[0] = join(x[0], x[1]);
  v4 y[2];
  std::memcpy(y, x, sizeof y);
  y[0] = join(y[0], y[1]);
  return join(join(y[0][0], y[0][2]), join(y[0][1], y[0][3]));
}

INLINE float sum16(v16 v) {
  return across(v, [](auto a, auto b) { return a + b; });
}

INLINE float max16(v16 v) {
  return across(v, [](auto a, auto b) { return a > b ? a : b; });
}

INLINE v16 exp16(v16 x) {  // Cephes' polynomial; exactly 0 below -87
  v16 kept = x < -87.f ? all(-87.f) : (x > 88.f ? all(88.f) : x);
  v16 n = nearest(kept * 1.44269504088896341f);
  v16 r = fma(n, all(-0.693359375f), kept);
  r = fma(n, all(2.12194440e-4f), r);
  v16 y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, r, all(c));
  y = fma(y, r * r, r) + 1.f;
  i16x power = (__builtin_convertvector(n, i16x) + 127) << 23;
  return x < -87.f ? v16{} : y * (v16)power;
}

// ---- formats: what a row of activations and a block of keys is made of ----

struct Single {
  typedef float Value;
  static constexpr int per_word = 1;
  INLINE v16 dot(v16 sum, u16x w, word x) { return fma((v16)w, (v16)all_bits(x), sum); }
  INLINE v16 round(v16 x) { return x; }
  INLINE void keep(Value* to, v16 x) { store(to, x); }
};

struct Half {
  typedef uint16_t Value;
  static constexpr int per_word = 2;
  INLINE v16 dot(v16 sum, u16x w, word x) { return dot_pairs(sum, w, x); }
  INLINE v16 round(v16 x) { return (v16)(__builtin_convertvector(to_bf16(x), u16x) << 16); }
  INLINE void keep(Value* to, v16 x) { *reinterpret_cast<h16*>(to) = to_bf16(x); }
};

}  // namespace

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__) && !defined(LITCHI_PLAIN)
#include "native_halves.h"
#else

namespace {

// out (R, 32) += R rows times one panel of weights, [inner word][32 outputs]. An odd last value of a pair is masked, so
// that whatever lies beside it counts for nothing.
template <class E, int R>
void tile(const word* x, long stride, const word* w, int inner, float* out, long ld) {
  v16 a[R], b[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) a[r] = load(out + r * ld), b[r] = load(out + r * ld + 16);
  int steps = inner / E::per_word;
  for (int i = 0; i < steps; ++i) {
    u16x wa = bits(w + i * BLOCK), wb = bits(w + i * BLOCK + 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) a[r] = E::dot(a[r], wa, x[r * stride + i]), b[r] = E::dot(b[r], wb, x[r * stride + i]);
  }
  if (inner % E::per_word) {
    u16x wa = bits(w + steps * BLOCK) & 0xffffu, wb = bits(w + steps * BLOCK + 16) & 0xffffu;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      word last = x[r * stride + steps] & 0xffffu;
      a[r] = E::dot(a[r], wa, last), b[r] = E::dot(b[r], wb, last);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) store(out + r * ld, a[r]), store(out + r * ld + 16, b[r]);
}

// The same for weights in groups of 32 inner values: 32 scales and 32 least values in fp16, then unsigned integers by
// fours, in the order 0 2 1 3, so that a mask finds a pair. A weight is scale * q + least, and a row has integers, a
// scale and a sum for each of its groups. The sum of a group is exact: at most 255 * 32767 * 32 < 2^31. Rows have 16
// bits, or 8, and then twice as much is summed in a step.
template <int BITS, int ROW_BITS, int R>
void quantised_tile(const word* x, long stride, const float* scale, const float* sum, const char* w, int inner,
                    float* out) {
  constexpr int PANEL = 128 + BLOCK * BLOCK * BITS / 8;
  constexpr int PAIRS = ROW_BITS == 16 ? 2 : 1;  // words of a row beside one of weights
  constexpr word BYTES = BITS == 4 ? 0x0f0f0f0fu : ~0u, MASK = ROW_BITS == 16 ? BYTES & 0x00ff00ffu : BYTES;
  constexpr int WAYS = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that need not wait for one another, where rows are few
  v16 a[R]{}, b[R]{};
  int groups = inner / BLOCK;
  for (int g = 0; g < groups; ++g, w += PANEL) {
    i16x p[R][WAYS]{}, q[R][WAYS]{};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      u16x wa = bits(w + 128 + i * 16 * BITS), wb = BITS == 4 ? wa >> 4 : bits(w + 192 + i * 16 * BITS);
#pragma GCC unroll 2
      for (int pair = 0; pair < PAIRS; ++pair, wa >>= 8, wb >>= 8) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          int at = i * PAIRS + pair;
          word both = x[r * stride + g * 8 * PAIRS + at];
          i16x &a_sum = p[r][at % WAYS], &b_sum = q[r][at % WAYS];
          if constexpr (ROW_BITS == 16)
            a_sum = dot_integers(a_sum, wa & MASK, both), b_sum = dot_integers(b_sum, wb & MASK, both);
          else
            a_sum = dot_quads(a_sum, wa & MASK, both), b_sum = dot_quads(b_sum, wb & MASK, both);
        }
      }
    }
    const uint16_t* half = reinterpret_cast<const uint16_t*>(w);
    v16 sa = from_half(half), sb = from_half(half + 16), la = from_half(half + 32), lb = from_half(half + 48);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      for (int way = 1; way < WAYS; ++way) p[r][0] += p[r][way], q[r][0] += q[r][way];
      v16 s = all(scale[(long)r * groups + g]), t = all(sum[(long)r * groups + g]);
      a[r] = fma(t, la, fma(__builtin_convertvector(p[r][0], v16) * s, sa, a[r]));
      b[r] = fma(t, lb, fma(__builtin_convertvector(q[r][0], v16) * s, sb, b[r]));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) store(out + r * BLOCK, a[r]), store(out + r * BLOCK + 16, b[r]);
}

}  // namespace

#endif

namespace {

typedef void (*Tile)(const word*, long, const word*, int, float*, long);
typedef void (*QuantisedTile)(const word*, long, const float*, const float*, const char*, int, float*);
template <class E>
constexpr Tile TILES[] = {tile<E, 1>, tile<E, 2>, tile<E, 3>, tile<E, 4>,  tile<E, 5>,  tile<E, 6>,
                          tile<E, 7>, tile<E, 8>, tile<E, 9>, tile<E, 10>, tile<E, 11>, tile<E, 12>};
template <int B, int A>
constexpr QuantisedTile QUANTISED_TILES[] = {quantised_tile<B, A, 1>, quantised_tile<B, A, 2>, quantised_tile<B, A, 3>,
                                             quantised_tile<B, A, 4>, quantised_tile<B, A, 5>, quantised_tile<B, A, 6>};

struct Matrix {  // native.py mirrors it
  const char* data;
  const float* bias;
  int32_t kind, inner, outputs, pad;
};

// ---- who does what ----

struct Range {
  long first, last;
};

struct Team {
  int size;
  std::atomic<int> waiting{0}, phase{0}, ticket{0};
};

struct Thread {
  Team& team;
  int index;

  Range share(long n) const { return {n * index / team.size, n * (index + 1) / team.size}; }

  void meet() const {  // spins, since stages are short, but yields where cores are
    if (team.size == 1) return;
    int phase = team.phase.load(std::memory_order_acquire);
    if (team.waiting.fetch_add(1, std::memory_order_acq_rel) == team.size - 1) {
      team.waiting.store(0, std::memory_order_relaxed);
      team.phase.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; team.phase.load(std::memory_order_acquire) == phase; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
#if defined(__linux__)
      if (spins > SPINS) sched_yield();
#endif
    }
  }
};

// ---- rows of activations, as a product wants them ----

struct Rows {
  Kind kind;
  int width;
  word* data;
  float *scale, *sum;  // of quantised rows, one for each 32 values

  long stride() const { return (kind == F32 ? width : kind < W8A8 ? width / 2 : width / 4) + PAD; }
  float at(const word* row, int i) const {  // an integer of a quantised row
    if (kind < W8A8) return reinterpret_cast<const int16_t*>(row)[i];
    return reinterpret_cast<const int8_t*>(row)[swapped(i)];
  }

  static int swapped(int i) { return (i & ~3) | (i & 1) << 1 | (i & 2) >> 1; }  // 0 2 1 3 of each four, as weights lie
  static long bytes(int width, long rows) { return rows * 4 * (width + PAD + width / BLOCK * 2) + 192; }

  void keep(long row, int block, v16 lo, v16 hi) const {  // 32 values
    word* to = data + row * stride();
    if (kind == F32) {
      Single::keep(reinterpret_cast<float*>(to) + block * BLOCK, lo);
      Single::keep(reinterpret_cast<float*>(to) + block * BLOCK + 16, hi);
    } else if (kind == BF16) {
      Half::keep(reinterpret_cast<uint16_t*>(to) + block * BLOCK, lo);
      Half::keep(reinterpret_cast<uint16_t*>(to) + block * BLOCK + 16, hi);
    } else if (kind < W8A8) {
      // 8 bits are too few for groups with large values, and cost SmolLM2 the capital of France.
      keep_quantised(row * (width / BLOCK) + block, reinterpret_cast<int16_t*>(to) + block * BLOCK, lo, hi, 32767.f);
    } else {
      keep_quantised(row * (width / BLOCK) + block, reinterpret_cast<int8_t*>(to) + block * BLOCK, lo, hi, 127.f);
    }
  }

  template <class T>
  void keep_quantised(long group, T* to, v16 lo, v16 hi, float top) const {
    v16 size_lo = (v16)((u16x)lo & 0x7fffffffu), size_hi = (v16)((u16x)hi & 0x7fffffffu);
    float most = max16(size_lo > size_hi ? size_lo : size_hi);
    float step = most / top, inverse = most > 0.f ? top / most : 0.f;
    lo = nearest(lo * inverse), hi = nearest(hi * inverse);
    put(to, lo), put(to + 16, hi);
    scale[group] = step, sum[group] = step * sum16(lo + hi);
  }

  static void put(int16_t* to, v16 x) {
    typedef int16_t s16 __attribute__((vector_size(32), aligned(2), may_alias));
    *reinterpret_cast<s16*>(to) = __builtin_convertvector(__builtin_convertvector(x, i16x), s16);
  }

  static void put(int8_t* to, v16 x) {  // 0 2 1 3 of each four, as weights lie
    typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
    typedef uint32_t w4 __attribute__((vector_size(16), aligned(1), may_alias));
    *reinterpret_cast<b16*>(to) = __builtin_convertvector(__builtin_convertvector(x, i16x), b16);
    w4 quads = *reinterpret_cast<w4*>(to);
    *reinterpret_cast<w4*>(to) = (quads & 0xff0000ffu) | (quads & 0xff00u) << 8 | (quads & 0xff0000u) >> 8;
  }
};

template <class T>
T* take(char*& room, long count) {
  T* at = reinterpret_cast<T*>(room);
  room += (count * sizeof(T) + 63) / 64 * 64;
  return at;
}

Rows take_rows(char*& room, int kind, int width, long rows) {
  Rows r{(Kind)kind, width, nullptr, nullptr, nullptr};
  r.data = take<word>(room, rows * r.stride());
  if (kind >= INT8) r.scale = take<float>(room, rows * width / BLOCK), r.sum = take<float>(room, rows * width / BLOCK);
  return r;
}

long panel_bytes(const Matrix& m) {
  switch (m.kind) {
    case F32: return (long)m.inner * BLOCK * 4;
    case BF16: return (long)m.inner * BLOCK * 2;
    case INT8:
    case W8A8: return (long)m.inner / BLOCK * (128 + BLOCK * BLOCK);
    default: return (long)m.inner / BLOCK * (128 + BLOCK * BLOCK / 2);
  }
}

// Every row times the panels of `share`; `put` is given a row, a panel and its 32 outputs. A panel stays in cache for
// all its rows, so that memory is read once.
template <class Put>
void product(const Matrix& m, const Rows& x, long rows, Range share, Put put) {
  alignas(64) float out[ROWS * BLOCK];
  int most = m.kind >= INT8 ? QUANTISED_ROWS : ROWS;
  long blocks = (rows + most - 1) / most, size = panel_bytes(m), stride = x.stride(), groups = m.inner / BLOCK;
  for (long panel = share.first; panel < share.last; ++panel) {
    const char* w = m.data + panel * size;
    for (long b = 0; b < blocks; ++b) {
      long row = rows * b / blocks, count = rows * (b + 1) / blocks - row;
      const word* from = x.data + row * stride;
      if (m.kind >= INT8) {
        auto run = (m.kind == INT8   ? QUANTISED_TILES<8, 16>
                    : m.kind == INT4 ? QUANTISED_TILES<4, 16>
                    : m.kind == W8A8 ? QUANTISED_TILES<8, 8>
                                     : QUANTISED_TILES<4, 8>)[count - 1];
        run(from, stride, x.scale + row * groups, x.sum + row * groups, w, m.inner, out);
      } else {
        std::fill(out, out + count * BLOCK, 0.f);
        auto run = (m.kind == F32 ? TILES<Single> : TILES<Half>)[count - 1];
        run(from, stride, reinterpret_cast<const word*>(w), m.inner, out, BLOCK);
      }
      for (long r = 0; r < count; ++r) {
        float* o = out + r * BLOCK;
        const float* bias = m.bias + panel * BLOCK;
        if (m.bias) store(o, load(o) + load(bias)), store(o + 16, load(o + 16) + load(bias + 16));
        put(row + r, (int)panel, o);
      }
    }
  }
}

INLINE float inverse_root(const float* x, int width, float epsilon) {
  v16 squares{};
  for (int i = 0; i < width; i += 16) squares = fma(load(x + i), load(x + i), squares);
  return 1.f / std::sqrt(sum16(squares) / (float)width + epsilon);
}

void norm(const float* x, const float* weight, int width, float epsilon, const Rows& to, long row) {
  if (!weight) {  // it has been done
    for (int i = 0; i < width; i += BLOCK) to.keep(row, i / BLOCK, load(x + i), load(x + i + 16));
    return;
  }
  v16 size = all(inverse_root(x, width, epsilon));
  for (int i = 0; i < width; i += BLOCK)
    to.keep(row, i / BLOCK, load(x + i) * size * load(weight + i), load(x + i + 16) * size * load(weight + i + 16));
}

}  // namespace
