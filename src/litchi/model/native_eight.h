// Keys and values in 8 bits, with a scale for each token and head: half the memory of bf16, and sums that are integers.
//
// Scores are integers times the scales of query and key, and what a chunk gives is a sum of integers times the largest
// weight: a value's scale goes into the weight of its token. Queries and weights have 16 bits. A key that is not to be
// read gets the weight 0, so that whatever lies there counts for nothing.

#pragma once

#include "native_attention.h"

namespace {

constexpr float TOP8 = 127.f, TOP16 = 32767.f;
constexpr int SCALE = 4;                  // bytes of a token's scale, which lie behind the 32 tokens of a block
constexpr int ORDER[] = {0, 2, 1, 3};     // of four bytes: every second one and the others are neighbours

struct Eight {
  typedef int8_t Value;
};

typedef int16_t i32h __attribute__((vector_size(64)));

INLINE v16 size_of(v16 x) { return (v16)((u16x)x & 0x7fffffffu); }

template <int R>
void integer_tile(const word* x, long stride, const int8_t* w, int quads, int32_t* out, long ld) {
  typedef i16x loose __attribute__((aligned(4), may_alias));
  i16x a[R], b[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const loose* from = reinterpret_cast<const loose*>(out + r * ld);
    a[r] = from[0], b[r] = from[1];
  }
  for (int q = 0; q < quads; ++q) {
    i32h wa = (i32h)bits(w + q * 128), wb = (i32h)bits(w + q * 128 + 64);
    u16x pairs[2][2] = {{(u16x)((wa << 8) >> 8), (u16x)((wb << 8) >> 8)}, {(u16x)(wa >> 8), (u16x)(wb >> 8)}};
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        word both = x[r * stride + q * 2 + p];
        a[r] = dot_integers(a[r], pairs[p][0], both), b[r] = dot_integers(b[r], pairs[p][1], both);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    loose* to = reinterpret_cast<loose*>(out + r * ld);
    to[0] = a[r], to[1] = b[r];
  }
}

typedef void (*IntegerTile)(const word*, long, const int8_t*, int, int32_t*, long);
constexpr IntegerTile INTEGER_TILES[] = {integer_tile<1>, integer_tile<2>,  integer_tile<3>,  integer_tile<4>,
                                         integer_tile<5>, integer_tile<6>,  integer_tile<7>,  integer_tile<8>,
                                         integer_tile<9>, integer_tile<10>, integer_tile<11>, integer_tile<12>};

// As integers up to `top`; the step is given back.
template <class T>
float round_to(T* to, const float* x, int count, float top) {
  v16 most{};
  for (int i = 0; i < count; i += 16) most = size_of(load(x + i)) > most ? size_of(load(x + i)) : most;
  float size = max16(most), inverse = size > 0.f ? top / size : 0.f;
  for (int i = 0; i < count; i += 16) {
    i16x q = __builtin_convertvector(nearest(load(x + i) * inverse), i16x);
    for (int k = 0; k < 16; ++k) to[i + k] = (T)q[k];
  }
  return size / top;
}

// Blocks of 32 tokens: keys [4 of K][32 tokens][4 of K], values [32 of K][4 tokens][32 of K][4 tokens], then scales.
template <>
struct Cache<Eight> {
  typedef int8_t Value;
  Value *keys, *values;
  const Network& n;
  const Call& c;

  Cache(const Network& n, const Call& c, int layer) : n(n), c(c) {
    long size = (long)layer * c.num_pages * n.kv_heads * c.page * (n.head_width + SCALE);
    keys = static_cast<Value*>(c.keys) + size, values = static_cast<Value*>(c.values) + size;
  }

  long block(int sequence, int kv, long index) const {
    long first = index * BLOCK, page = c.tables[(long)sequence * c.max_pages + first / c.page];
    return ((page * n.kv_heads + kv) * c.page + first % c.page) * (n.head_width + SCALE);
  }

  float* scales(Value* at) const { return reinterpret_cast<float*>(at + BLOCK * n.head_width); }

  static long words(const Network& n) { return n.head_width / 2 + 1; }  // of a query, its scale the last

  void keep_query(word* to, const float* x) const {
    float step = round_to(reinterpret_cast<int16_t*>(to), x, n.head_width, TOP16);
    std::memcpy(to + n.head_width / 2, &step, sizeof step);
  }

  void write(Value* pages, int token, int kv, const float* x) const {
    int slot = c.slot[token], j = slot % BLOCK;
    Value *to = pages + block(c.sequence[token], kv, slot / BLOCK), q[MAX_HEAD_WIDTH];
    scales(to)[j] = round_to(q, x, n.head_width, TOP8);
    for (int d = 0; d < n.head_width; ++d) {
      int key = (d / 4 * BLOCK + j) * 4 + ORDER[d % 4];
      int value = ((d / BLOCK * (BLOCK / 4) + j / 4) * BLOCK + d % BLOCK) * 4 + ORDER[j % 4];
      to[pages == keys ? key : value] = q[d];
    }
  }
};

// Softmax of one row over `count` keys of a chunk; gives back the step of its integer weights.
float weigh(const int32_t* dots, const float* key, const float* value, int count, float scale, int16_t* weight,
            float& top, float& sum) {
  typedef i16x loose __attribute__((aligned(4), may_alias));
  alignas(64) float score[CHUNK];
  v16 most = all(-INFINITY), total{};
  for (int i = 0; i < CHUNK; i += 16) {
    v16 s = __builtin_convertvector(*reinterpret_cast<const loose*>(dots + i), v16) * scale;
    store(score + i, s * load(key + i));
  }
  std::fill(score + count, score + CHUNK, -INFINITY);  // whatever lies there
  for (int i = 0; i < CHUNK; i += 16) most = load(score + i) > most ? load(score + i) : most;
  top = max16(most);
  for (int i = 0; i < CHUNK; i += 16) {
    v16 p = exp16(load(score + i) - top);
    total += p;
    store(score + i, p * load(value + i));
  }
  std::fill(score + count, score + CHUNK, 0.f);
  sum = sum16(total);
  return round_to(weight, score, CHUNK, TOP16);
}

void look(const Cache<Eight>& cache, const Job& job, const word* query, long chunk, Part part) {
  alignas(64) int32_t dots[ROWS * CHUNK]{}, sums[ROWS * MAX_HEAD_WIDTH]{};
  alignas(64) int16_t weight[ROWS * CHUNK]{};
  alignas(64) float key[CHUNK]{}, value[CHUNK]{}, step[ROWS];
  int width = cache.n.head_width, words = (int)Cache<Eight>::words(cache.n), most = 0;
  long first = chunk * (CHUNK / BLOCK);
  for (int r = 0; r < job.rows; ++r) most = std::max(most, readable(job, r, chunk));
  auto block = [&](int8_t* pages, long index) { return pages + cache.block(job.sequence, job.kv, first + index); };
  auto soon = [&](int8_t* pages, long index) {
    if ((first + index) * BLOCK < job.most) fetch(block(pages, index), (long)BLOCK * (width + SCALE));
  };
  for (int b = 0; b * BLOCK < most; ++b) {
    int8_t* keys = block(cache.keys, b);
    (b + 1) * BLOCK < most ? soon(cache.keys, b + 1) : soon(cache.values, 0);
    INTEGER_TILES[job.rows - 1](query, words, keys, width / 4, dots + b * BLOCK, CHUNK);
    std::copy_n(cache.scales(keys), BLOCK, key + b * BLOCK);
    std::copy_n(cache.scales(block(cache.values, b)), BLOCK, value + b * BLOCK);
  }
  for (int r = 0; r < job.rows; ++r) {
    float scale;
    std::memcpy(&scale, query + r * words + width / 2, sizeof scale);
    scale *= 1.f / std::sqrt((float)width);
    if (int count = readable(job, r, chunk))
      step[r] = weigh(dots + r * CHUNK, key, value, count, scale, weight + r * CHUNK, part.top[r], part.sum[r]);
  }
  for (int b = 0; b * BLOCK < most; ++b) {
    const int8_t* values = block(cache.values, b);
    soon((b + 1) * BLOCK < most ? cache.values : cache.keys, b + 1);
    const word* p = reinterpret_cast<const word*>(weight) + b * (BLOCK / 2);
    for (int d = 0; d < width; d += BLOCK)
      INTEGER_TILES[job.rows - 1](p, CHUNK / 2, values + d * BLOCK, BLOCK / 4, sums + d, MAX_HEAD_WIDTH);
  }
  for (int r = 0; r < job.rows; ++r)
    if (readable(job, r, chunk))
      for (int d = 0; d < width; ++d) part.out[r * width + d] = (float)sums[r * MAX_HEAD_WIDTH + d] * step[r];
}

}  // namespace
