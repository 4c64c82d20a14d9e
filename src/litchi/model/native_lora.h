// Low-rank updates beside the products: y += up (down x), for each row by the adapter of its sequence, or not at all.
//
// A row is narrowed and widened by itself, each sum in one fixed order, so that no neighbour can change a bit; a row
// without an adapter is not touched. As in a product, rows are rounded to the format of the weights, bf16 or fp32, and
// sums are fp32. Weights lie in the order in which they are read: adapters differ from row to row, so that memory is
// what they cost.

#pragma once

#include "native_product.h"

namespace {

constexpr int SUMS = 4;               // ranks that are summed at once; native_adapters.py fills each matrix up to it
constexpr int MAX_NARROW = 3 * 256;   // of the three matrices of attention

// ---- what Python hands over; the structures of native_adapters.py mirror these ----

struct Widening {  // of one panel of 32 outputs: [word of ranks][32], for the narrowed values from `first` on
  const word* up;
  int32_t first, count;
};

struct Update {  // of one product, whose matrices may be several in one: [ranks / 4][16 words of inner][4][16 words]
  const word* down;
  const Widening* panels;
  int32_t rank, kind;  // the rank of all together
};

enum Site { QKV, OUT, GATE_UP, DOWN, SITES };

// ---- one row ----

INLINE v16 dot_words(Single, v16 sum, u16x w, u16x x) { return fma((v16)w, (v16)x, sum); }

INLINE v16 dot_words(Half, v16 sum, u16x w, u16x x) {
#if defined(__AVX512BF16__) && !defined(LITCHI_PLAIN)
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
  sum = fma((v16)(w << 16), (v16)(x << 16), sum);
  return fma((v16)(w & 0xffff0000u), (v16)(x & 0xffff0000u), sum);
#endif
}

// to (rank) = down times a row of so many words.
template <class E>
void narrow_row(const word* down, long words, int rank, const word* x, typename E::Value* to) {
  alignas(64) float sums[MAX_NARROW + 16];
  for (int r = 0; r < rank; r += SUMS) {
    v16 a{}, b{}, c{}, d{};
    for (long i = 0; i < words; i += 16, down += SUMS * 16) {
      u16x at = bits(x + i);
      a = dot_words(E{}, a, bits(down), at), b = dot_words(E{}, b, bits(down + 16), at);
      c = dot_words(E{}, c, bits(down + 32), at), d = dot_words(E{}, d, bits(down + 48), at);
    }
    sums[r] = sum16(a), sums[r + 1] = sum16(b), sums[r + 2] = sum16(c), sums[r + 3] = sum16(d);
  }
  std::fill(sums + rank, sums + rank + 16, 0.f);
  for (int r = 0; r < rank; r += 16) E::keep(to + r, load(sums + r));
}

// out (32) += one panel times what a row was narrowed to.
template <class E>
void widen_row(const Widening& panel, const word* x, float* out) {
  v16 a{}, b{};
  const word* up = panel.up;
  for (int i = 0; i < panel.count / E::per_word; ++i, up += BLOCK)
    a = E::dot(a, bits(up), x[i]), b = E::dot(b, bits(up + 16), x[i]);
  fetch(up, (long)panel.count / E::per_word * BLOCK * 4);  // the next panel lies behind
  store(out, load(out) + a), store(out + 16, load(out + 16) + b);
}

// ---- the rows of one thread, at one product after another ----

struct Lora {
  const Update* const* of;  // of each sequence [layer][site], null where it has none; null if nobody has any
  const int32_t* sequence;
  word *narrowed, *row_words;  // a row for each token; room for one row in bf16
  long widest, at = 0;

  static long row_bytes(long widest) { return (widest + 15) / 16 * 64; }

  void go(int layer, Site site) { at = (long)layer * SITES + site; }

  const Update* update(long row) const {
    const Update* all = of ? of[sequence[row]] : nullptr;
    return all && all[at].rank ? all + at : nullptr;
  }

  word* narrow_of(long row) const { return narrowed + row * row_bytes(widest) / 4; }

  const word* words_of(const Rows& x, long row) const {
    const word* from = x.data + row * x.stride();
    if (x.kind == F32 || x.kind == BF16) return from;
    const float* scale = x.scale + row * (x.width / BLOCK);
    for (int i = 0; i < x.width; i += 16) {
      v16 q;
      for (int k = 0; k < 16; ++k) q[k] = x.at(from, i + k);
      Half::keep(reinterpret_cast<uint16_t*>(row_words) + i, q * scale[i / BLOCK]);
    }
    return row_words;
  }

  void narrow(const Rows& x, Range own) const {
    for (long row = own.first; of && row < own.last; ++row)
      if (const Update* u = update(row)) {
        const word* from = words_of(x, row);
        word* to = narrow_of(row);
        u->kind == F32 ? narrow_row<Single>(u->down, x.width, u->rank, from, reinterpret_cast<float*>(to))
                       : narrow_row<Half>(u->down, x.width / 2, u->rank, from, reinterpret_cast<uint16_t*>(to));
      }
  }

  void widen(long row, int panel, float* out) const {
    const Update* u = update(row);
    if (!u || !u->panels[panel].count) return;
    const Widening& p = u->panels[panel];
    u->kind == F32 ? widen_row<Single>(p, narrow_of(row) + p.first, out)
                   : widen_row<Half>(p, narrow_of(row) + p.first / 2, out);
  }
};

}  // namespace
