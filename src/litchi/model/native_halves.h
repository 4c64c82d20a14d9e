// Tiles for a CPU whose registers have 256 bits (AVX2): what native_product.h says of sixteen lanes, in two halves of
// eight. Every lane does the same operations in the same order, so that the bits are those of LITCHI_PLAIN.
//
// There are 16 registers: rows go through a panel by threes, twos for bf16, and it stays in cache meanwhile.

#pragma once

#include "native_product.h"

namespace {

constexpr int PARTS = BLOCK / 8;  // of the 32 outputs of a row

INLINE __m256i eight(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256i every(word x) { return _mm256_set1_epi32((int)x); }
INLINE __m256i low(__m256i pairs) { return _mm256_slli_epi32(pairs, 16); }
INLINE __m256i high(__m256i pairs) { return _mm256_and_si256(pairs, every(0xffff0000u)); }
INLINE __m256 fma(__m256i a, __m256i b, __m256 c) {
  return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), c);
}

// One step of R rows: 32 words of weights with a word of each row, both masked.
template <class E, int R>
INLINE void step(__m256 (&sum)[R][PARTS], const word* x, long stride, const word* w, word mask) {
  __m256i first[R], second[R];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r) {
    __m256i each = every(x[r * stride] & mask);
    first[r] = E::per_word == 1 ? each : low(each), second[r] = high(each);
  }
#pragma GCC unroll 4
  for (int part = 0; part < PARTS; ++part) {
    __m256i v = _mm256_and_si256(eight(w + part * 8), every(mask));
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      sum[r][part] = fma(E::per_word == 1 ? v : low(v), first[r], sum[r][part]);
      if (E::per_word == 2) sum[r][part] = fma(high(v), second[r], sum[r][part]);
    }
  }
}

template <class E, int R>
INLINE void few(const word* x, long stride, const word* w, int inner, float* out, long ld) {
  __m256 sum[R][PARTS];
  for (int r = 0; r < R; ++r)
    for (int part = 0; part < PARTS; ++part) sum[r][part] = _mm256_loadu_ps(out + r * ld + part * 8);
  int steps = inner / E::per_word;
  for (int i = 0; i < steps; ++i) step<E, R>(sum, x + i, stride, w + i * BLOCK, ~0u);
  if (inner % E::per_word) step<E, R>(sum, x + steps, stride, w + steps * BLOCK, 0xffffu);
  for (int r = 0; r < R; ++r)
    for (int part = 0; part < PARTS; ++part) _mm256_storeu_ps(out + r * ld + part * 8, sum[r][part]);
}

template <class E, int R>
void tile(const word* x, long stride, const word* w, int inner, float* out, long ld) {
  constexpr int MOST = 4 - E::per_word;
  if constexpr (R > MOST) {
    few<E, MOST>(x, stride, w, inner, out, ld);
    tile<E, R - MOST>(x + MOST * stride, stride, w, inner, out + MOST * ld, ld);
  } else {
    few<E, R>(x, stride, w, inner, out, ld);
  }
}

// Eight words of weights with one of a row, as `dot_integers` and `dot_quads`. Integers: exact in any order.
template <int BITS, int ROW_BITS>
INLINE __m256i dot(__m256i sum, __m256i w, word x) {
  __m256i each = every(x), even = every(0x00ff00ffu);
  if (ROW_BITS == 16) return _mm256_add_epi32(sum, _mm256_madd_epi16(w, each));
  if (BITS == 4) {  // a pair of products is at most 2 * 15 * 127, which 16 bits hold
    __m256i pairs = _mm256_maddubs_epi16(w, each);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  __m256i least = _mm256_srai_epi16(_mm256_slli_epi16(each, 8), 8), most = _mm256_srai_epi16(each, 8);
  __m256i some = _mm256_madd_epi16(_mm256_and_si256(w, even), least);
  return _mm256_add_epi32(sum, _mm256_add_epi32(some, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), most)));
}

template <int BITS, int ROW_BITS, int R>
INLINE void quantised_few(const word* x, long stride, const float* scale, const float* sum, const char* w, int groups,
                          float* out) {
  constexpr int PANEL = 128 + BLOCK * BLOCK * BITS / 8;
  constexpr int PAIRS = ROW_BITS == 16 ? 2 : 1;
  constexpr word BYTES = BITS == 4 ? 0x0f0f0f0fu : ~0u, MASK = ROW_BITS == 16 ? BYTES & 0x00ff00ffu : BYTES;
  __m256 total[R][PARTS];
  for (int r = 0; r < R; ++r)
    for (int part = 0; part < PARTS; ++part) total[r][part] = _mm256_setzero_ps();
  for (int g = 0; g < groups; ++g, w += PANEL) {
    __m256i p[R][PARTS];
#pragma GCC unroll 12
    for (int i = 0; i < R * PARTS; ++i) p[i / PARTS][i % PARTS] = _mm256_setzero_si256();
    for (int i = 0; i < 8; ++i) {
      const char* at = w + 128 + i * 16 * BITS;
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) {
        __m256i v = BITS == 4 ? eight(at + part % 2 * 32) : eight(at + part * 32);
        if (BITS == 4 && part >= 2) v = _mm256_srli_epi32(v, 4);
#pragma GCC unroll 2
        for (int pair = 0; pair < PAIRS; ++pair) {
          __m256i own = _mm256_and_si256(pair ? _mm256_srli_epi32(v, 8) : v, every(MASK));
#pragma GCC unroll 3
          for (int r = 0; r < R; ++r)
            p[r][part] = dot<BITS, ROW_BITS>(p[r][part], own, x[r * stride + (g * 8 + i) * PAIRS + pair]);
        }
      }
    }
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      const __m128i* half = reinterpret_cast<const __m128i*>(w + part * 16);
      __m256 s = _mm256_cvtph_ps(_mm_loadu_si128(half)), least = _mm256_cvtph_ps(_mm_loadu_si128(half + PARTS));
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) {
        __m256 step = _mm256_set1_ps(scale[(long)r * groups + g]), all = _mm256_set1_ps(sum[(long)r * groups + g]);
        __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(p[r][part]), step);
        total[r][part] = _mm256_fmadd_ps(all, least, _mm256_fmadd_ps(scaled, s, total[r][part]));
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int part = 0; part < PARTS; ++part) _mm256_storeu_ps(out + r * BLOCK + part * 8, total[r][part]);
}

template <int BITS, int ROW_BITS, int R>
void quantised_tile(const word* x, long stride, const float* scale, const float* sum, const char* w, int inner,
                    float* out) {
  int groups = inner / BLOCK;
  if constexpr (R > 3) {
    quantised_few<BITS, ROW_BITS, 3>(x, stride, scale, sum, w, groups, out);
    quantised_tile<BITS, ROW_BITS, R - 3>(x + 3 * stride, stride, scale + 3L * groups, sum + 3L * groups, w, inner,
                                          out + 3 * BLOCK);
  } else {
    quantised_few<BITS, ROW_BITS, R>(x, stride, scale, sum, w, groups, out);
  }
}

}  // namespace
