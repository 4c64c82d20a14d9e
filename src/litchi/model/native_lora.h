// Low-rank updates beside the products: y += up (down x), for each row by the adapter of its sequence, or not at all.
//
// A row is narrowed and widened by itself, each sum in one fixed order, so that no neighbour can change a bit; a row
// without an adapter is not touched. Sums are fp32; x is what the product reads; weights are bf16 or fp32.

#pragma once

#include "native_product.h"

namespace {

// ---- what Python hands over; the structures of native_adapters.py mirror these ----

struct Widening {  // of one panel of 32 outputs: [count][32] weights, for the narrowed values from `first` on
  const void* up;
  int32_t first, count;
};

struct Update {  // of one product, whose matrices may be several in one: [rank][inner] weights, and its panels
  const void* down;
  const Widening* panels;
  int32_t rank, kind;  // the rank of all together, a multiple of 4
};

enum Site { QKV, OUT, GATE_UP, DOWN, SITES };

// ---- values, sixteen at a time ----

INLINE v16 wide(const float* p) { return load(p); }
INLINE v16 wide(const uint16_t* p) {
  return (v16)(__builtin_convertvector(*reinterpret_cast<const h16*>(p), u16x) << 16);
}

struct SingleRow {
  const float* x;
  v16 operator()(long i) const { return load(x + i); }
};

struct HalfRow {
  const uint16_t* x;
  v16 operator()(long i) const { return wide(x + i); }
};

struct QuantisedRow {
  const int8_t* x;
  const float* scale;
  v16 operator()(long i) const {
    typedef int8_t b16 __attribute__((vector_size(16), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const b16*>(x + i), v16) * scale[i / BLOCK];
  }
};

// to (rank) = down times a row; four sums at a time, each over lanes that are joined at the end.
template <class W, class X>
void narrow_row(const W* down, long width, int rank, X row, float* to) {
  for (int r = 0; r < rank; r += 4, down += 4 * width) {
    v16 a{}, b{}, c{}, d{};
    for (long i = 0; i < width; i += 16) {
      v16 x = row(i);
      a = fma(wide(down + i), x, a), b = fma(wide(down + width + i), x, b);
      c = fma(wide(down + 2 * width + i), x, c), d = fma(wide(down + 3 * width + i), x, d);
    }
    to[r] = sum16(a), to[r + 1] = sum16(b), to[r + 2] = sum16(c), to[r + 3] = sum16(d);
  }
}

template <class W>
void narrow_row(const W* down, int rank, const Rows& x, long row, float* to) {
  const word* at = x.data + row * x.stride();
  if (x.kind == F32) return narrow_row(down, x.width, rank, SingleRow{reinterpret_cast<const float*>(at)}, to);
  if (x.kind == BF16) return narrow_row(down, x.width, rank, HalfRow{reinterpret_cast<const uint16_t*>(at)}, to);
  narrow_row(down, x.width, rank, QuantisedRow{reinterpret_cast<const int8_t*>(at), x.scale + row * (x.width / BLOCK)},
             to);
}

// out (32) += up times what a row was narrowed to; even and odd ranks are summed apart.
template <class W>
void widen_row(const W* up, int count, const float* x, float* out) {
  v16 a{}, b{}, c{}, d{};
  for (int r = 0; r + 1 < count; r += 2, up += 2 * BLOCK) {
    a = fma(wide(up), all(x[r]), a), b = fma(wide(up + 16), all(x[r]), b);
    c = fma(wide(up + 32), all(x[r + 1]), c), d = fma(wide(up + 48), all(x[r + 1]), d);
  }
  if (count % 2) a = fma(wide(up), all(x[count - 1]), a), b = fma(wide(up + 16), all(x[count - 1]), b);
  store(out, load(out) + (a + c)), store(out + 16, load(out + 16) + (b + d));
}

// The updates of one thread's rows, at one product after another.
struct Lora {
  const Update* const* of;  // of each sequence [layer][site], null where it has none; null if nobody has any
  const int32_t* sequence;
  float* narrowed;  // a row for each token
  long widest, at = 0;

  void go(int layer, Site site) { at = (long)layer * SITES + site; }

  const Update* update(long row) const {
    const Update* all = of ? of[sequence[row]] : nullptr;
    return all && all[at].rank ? all + at : nullptr;
  }

  void narrow(const Rows& x, Range own) const {
    for (long row = own.first; of && row < own.last; ++row)
      if (const Update* u = update(row)) {
        float* to = narrowed + row * widest;
        u->kind == F32 ? narrow_row(static_cast<const float*>(u->down), u->rank, x, row, to)
                       : narrow_row(static_cast<const uint16_t*>(u->down), u->rank, x, row, to);
      }
  }

  void widen(long row, int panel, float* out) const {
    const Update* u = update(row);
    if (!u || !u->panels[panel].count) return;
    const Widening& p = u->panels[panel];
    const float* x = narrowed + row * widest + p.first;
    u->kind == F32 ? widen_row(static_cast<const float*>(p.up), p.count, x, out)
                   : widen_row(static_cast<const uint16_t*>(p.up), p.count, x, out);
  }
};

}  // namespace
