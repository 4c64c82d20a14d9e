// How weights are rounded and laid out for the product that reads them. oracle: packing.pack, rounding.search
//
// One group of 32 inner values has one SIMD lane, so that sixteen outputs are fitted together and none by another.

#pragma once

#include "native_product.h"

namespace {

typedef v16 Groups[BLOCK];  // the 32 values of sixteen groups

INLINE h16 to_half(v16 x) {  // ties to even
#if defined(__AVX512F__) && !defined(LITCHI_PLAIN)
  return (h16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  u16x u = (u16x)x, sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
  u16x small = (u16x)((v16)size + 0.5f) - 0x3f000000u;  // a unit in the last place of 0.5 is one of the least halves
  u16x normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  u16x half = size < 0x38800000u ? small : (size > 0x477fefffu ? all_bits(0x7c00u) : normal);
  return __builtin_convertvector(half | sign, h16);
#endif
}

INLINE v16 halved(v16 x) {
  h16 half = to_half(x);
  return from_half(reinterpret_cast<const uint16_t*>(&half));
}

INLINE v16 bounded(v16 x, float top) { return x < 0.f ? v16{} : (x > top ? all(top) : x); }

INLINE bool any(i16x mask) {
#if defined(__AVX512F__) && !defined(LITCHI_PLAIN)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < 16; ++i) found |= mask[i];
  return found != 0;
#endif
}

// What a miss of each of the 32 inner values counts.
struct Worth {
  const float* each;
  float total;

  v16 operator()(v16 x, int i) const { return x * each[i]; }
};

struct Alike {  // the same as 32 ones, to the bit
  static constexpr float total = BLOCK;

  v16 operator()(v16 x, int) const { return x; }
};

// Sixteen groups as scale * integer + least, and the squares of what that misses.
struct Fit {
  v16 scale, least, missed;

  v16 inverse() const { return 1.f / (scale > 1e-30f ? scale : all(1e-30f)); }
};

template <class W>
INLINE Fit fit(const Groups& w, W worth, v16 scale, v16 least, float top) {
  Fit f{halved(scale), halved(least), v16{}};
  v16 inverse = f.inverse();
  for (int i = 0; i < BLOCK; ++i) {
    v16 q = bounded(nearest((w[i] - f.least) * inverse), top), missed = w[i] - (q * f.scale + f.least);
    f.missed += worth(missed * missed, i);
  }
  return f;
}

INLINE void keep(Fit& best, const Fit& f, i16x where) {
  best.scale = where ? f.scale : best.scale, best.least = where ? f.least : best.least;
  best.missed = where ? f.missed : best.missed;
}

// The line that lies nearest to the values, once they have been cut to the integers that `inverse` gives.
template <class W>
INLINE Fit regression(const Groups& w, W worth, v16 least, v16 inverse, float top) {
  v16 ones{}, squares{}, values{}, products{};
  for (int i = 0; i < BLOCK; ++i) {
    v16 value = w[i] - least, q = bounded(nearest(value * inverse), top), counted = worth(q, i);
    ones += counted, squares += counted * q, values += worth(value, i), products += counted * value;
  }
  v16 apart = worth.total * squares - ones * ones;
  v16 scale = (worth.total * products - values * ones) / (apart > 0.f ? apart : all(1.f));
  return fit(w, worth, scale, least + (values - scale * ones) / worth.total, top);
}

// Groups that lie on a grid stay bit for bit what they are. Of few steps no regression finds the place among sixteen, so
// that every place is tried where steps do not miss the first values by an eighth.
INLINE Fit on_grid(const Groups& w, v16 low, v16 range) {
  Fit found{v16{}, v16{}, all(INFINITY)};
  for (int steps = 1; steps < 8; ++steps) {
    Fit f{halved(range / (float)steps), v16{}, v16{}};
    v16 inverse = f.inverse();
    i16x near = f.scale > 0.f;
    for (int i = 0; i < 8 && any(near); ++i) {
      v16 q = (w[i] - low) * inverse, off = q - nearest(q);
      near &= (off < 0.125f) & (off > -0.125f);
    }
    for (int down = 0; down <= 15 - steps && any(near); ++down) {
      f.least = halved(low - f.scale * (float)down);
      i16x same = near;
      for (int i = 0; i < BLOCK && any(same); ++i)
        same &= w[i] == bounded(nearest((w[i] - f.least) * inverse), 15.f) * f.scale + f.least;
      keep(found, f, same & (found.missed > 0.f));
    }
  }
  return found;
}

// Eight bits take the whole range. For four it is worth while to look about: for fewer steps, which find the ones of
// weights that were in four bits before, and for more, which cut the largest values off; then for a least value further
// down, whose half is nearer. Where more than rounding is missed, one end is cut off alone, and the best line drawn again
// and again through what it makes of the values.
template <class W>
Fit best_fit(const Groups& w, W worth, int bits) {
  float top = (float)((1 << bits) - 1);
  v16 low = w[0], high = w[0];
  for (int i = 1; i < BLOCK; ++i) low = w[i] < low ? w[i] : low, high = w[i] > high ? w[i] : high;
  v16 range = high - low;
  Fit best = fit(w, worth, range / top, low, top);
  if (bits == 8) return best;
  Fit grid = on_grid(w, low, range);
  keep(best, grid, grid.missed < best.missed);
  if (!any(best.missed > 0.f)) return best;
  auto look = [&](const Fit& f, i16x where) { keep(best, f, (f.missed < best.missed) & where); };
  i16x everywhere = best.missed > 0.f;
  v16 apart = range > 1e-30f ? range : all(1e-30f);
  for (float steps : {8.f, 9.f, 10.f, 11.f, 12.f, 13.f, 14.f, 15.f, 15.5f, 16.f, 16.5f, 17.f, 18.f}) {
    float cut = std::max(0.f, (steps - top) * 0.5f);
    look(regression(w, worth, low + range * (cut / steps), steps / apart, top), everywhere);
  }
  Fit found = best;
  for (int down = 0; down < 8; ++down)
    look(fit(w, worth, found.scale, low - found.scale * (float)down, top), everywhere);
  i16x off = best.missed * (32.f * 32.f) > best.scale * best.scale * worth.total;
  if (!any(off)) return best;
  for (float steps : {15.5f, 16.5f, 17.5f, 18.5f}) {
    for (float cut : {0.f, steps - top})
      look(regression(w, worth, low + range * (cut / steps), steps / apart, top), off);
  }
  for (int again = 0; again < 2; ++again) look(regression(w, worth, best.least, best.inverse(), top), off);
  return best;
}

// Scale and least value of groups of 32 values, one below another.
void fit_rows(const float* values, Worth worth, long rows, float* scale, float* least) {
  alignas(64) Groups w;
  for (long row = 0; row < rows; row += 16) {
    long count = std::min(16L, rows - row);
    for (int o = 0; o < 16; ++o)
      for (int i = 0; i < BLOCK; ++i) w[i][o] = o < count ? values[(row + o) * BLOCK + i] : 0.f;
    Fit f = best_fit(w, worth, 4);
    for (int o = 0; o < count; ++o) scale[row + o] = f.scale[o], least[row + o] = f.least[o];
  }
}

template <int BITS>
void pack_groups(const Groups (&w)[2], char* to) {
  Fit f[2] = {best_fit(w[0], Alike{}, BITS), best_fit(w[1], Alike{}, BITS)};
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<h16*>(to + half * 32) = to_half(f[half].scale);
    *reinterpret_cast<h16*>(to + 64 + half * 32) = to_half(f[half].least);
  }
  constexpr int SHIFTS[] = {0, 16, 8, 24};  // a mask of every second byte finds a pair of neighbours
  for (int quad = 0; quad < BLOCK / 4; ++quad) {
    u16x words[2]{};
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        v16 steps = (w[half][quad * 4 + i] - f[half].least) * f[half].inverse();
        v16 q = bounded(nearest(steps), (float)((1 << BITS) - 1));
        words[half] |= (u16x)__builtin_convertvector(q, i16x) << SHIFTS[i];
      }
    }
    u16_loose* at = reinterpret_cast<u16_loose*>(to + 128 + quad * 16 * BITS);
    if (BITS == 4) {
      at[0] = words[0] | (words[1] << 4);
    } else {
      at[0] = words[0], at[1] = words[1];
    }
  }
}

// One panel of a matrix (outputs, inner), whose rows beyond the last are zeros.
void pack_panel(const float* weight, const Matrix& m, long panel, char* to) {
  alignas(64) Groups w[2];
  long size = panel_bytes(m) / (m.inner / BLOCK);
  for (int block = 0; block < m.inner / BLOCK; ++block, to += size) {
    for (int o = 0; o < BLOCK; ++o) {
      long row = panel * BLOCK + o;
      const float* from = weight + row * m.inner + block * BLOCK;
      for (int i = 0; i < BLOCK; ++i) w[o / 16][i][o % 16] = row < m.outputs ? from[i] : 0.f;
    }
    switch (m.kind) {
      case F32:
        for (int i = 0; i < 2 * BLOCK; ++i) store(reinterpret_cast<float*>(to) + i * 16, w[i % 2][i / 2]);
        break;
      case BF16:
        for (int i = 0; i < BLOCK; ++i) {
          const v16* pair = &w[i % 2][i / 2 * 2];
          u16x first = __builtin_convertvector(to_bf16(pair[0]), u16x);
          *reinterpret_cast<u16_loose*>(to + i * 64) = first | (__builtin_convertvector(to_bf16(pair[1]), u16x) << 16);
        }
        break;
      case INT8:
      case W8A8: pack_groups<8>(w, to); break;
      default: pack_groups<4>(w, to);
    }
  }
}

}  // namespace
