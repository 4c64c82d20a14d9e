// Attention over pages: what a row finds among its own keys, chunk by chunk, and how chunks are folded.
//
// Chunks begin at absolute multiples of CHUNK and are folded in order; a row reads its own keys and no other.

#pragma once

#include "native_lora.h"
#include "native_product.h"

namespace {

constexpr int CHUNK = 128;          // keys whose softmax is taken together
constexpr int MAX_HEAD_WIDTH = 256;
constexpr int PART = 2 * ROWS + 8;  // floats of a part before its rows: maxima, sums

// ---- what Python hands over; the structures of native.py mirror these ----

struct Layer {
  Matrix qkv, out, gate_up, down;
  const float *norm, *late_norm, *q_norm, *k_norm;
};

struct Network {
  int32_t width, layers, heads, kv_heads, head_width, mlp_width, kv_kind;
  float epsilon;
  const Layer* layer;
  const float* norm;
  Matrix head;
};

struct Call {
  int32_t tokens, sequences, max_pages, num_pages, page, threads, widest;
  const float *x, *cos, *sin;
  float* hidden;
  void *keys, *values;
  const int32_t *sequence, *slot, *end, *tables;
  const Update* const* adapters;
  char* room;
};

// ---- attention ----

// Keys and values of one layer, in blocks of 32 tokens laid out as panels: keys [word of K][32 tokens], values
// [32 dims][word of tokens][32 of K], so that scores and sums of values are the tiles of a product.
template <class E>
struct Cache {
  typedef typename E::Value Value;
  Value *keys, *values;
  const Network& n;
  const Call& c;

  Cache(const Network& n, const Call& c, int layer) : n(n), c(c) {
    long size = (long)layer * c.num_pages * n.kv_heads * c.page * n.head_width;
    keys = static_cast<Value*>(c.keys) + size, values = static_cast<Value*>(c.values) + size;
  }

  long block(int sequence, int kv, long index) const {
    long first = index * BLOCK, page = c.tables[(long)sequence * c.max_pages + first / c.page];
    return ((page * n.kv_heads + kv) * c.page + first % c.page) * n.head_width;
  }

  static long words(const Network& n) { return n.head_width / E::per_word; }  // of a query

  void keep_query(word* to, const float* x) const {
    for (int i = 0; i < n.head_width; i += 16) E::keep(reinterpret_cast<Value*>(to) + i, load(x + i));
  }

  void write(Value* pages, int token, int kv, const float* x) const {
    constexpr int P = E::per_word;
    int slot = c.slot[token], j = slot % BLOCK;
    Value* to = pages + block(c.sequence[token], kv, slot / BLOCK);
    for (int i = 0; i < n.head_width; i += 16) {
      Value v[16];
      E::keep(v, load(x + i));
      for (int k = 0; k < 16; ++k) {
        int d = i + k;
        long key = (d / P * BLOCK + j) * P + d % P;
        long value = ((d / BLOCK * (BLOCK / P) + j / P) * BLOCK + d % BLOCK) * P + j % P;
        to[pages == keys ? key : value] = v[k];
      }
    }
  }
};

// Queries that read the same keys: some tokens of a sequence, times the heads that share a key-value head.
struct Job {
  int rows, sequence, kv, end[ROWS], token[ROWS], head[ROWS], most;
};

// What one chunk of keys gives to the rows of a job: maxima and sums of the softmax, and unscaled rows.
struct Part {
  float *top, *sum, *out;
  explicit Part(float* at) : top(at), sum(at + ROWS), out(at + PART) {}
  static long size(const Network& n) { return PART + (long)ROWS * n.head_width; }
};

int readable(const Job& job, int row, long chunk) {
  return (int)std::clamp(job.end[row] - chunk * CHUNK, 0L, (long)CHUNK);
}

template <class E>
void softmax(float* score, int count, float scale, typename E::Value* weight, float& top, float& sum) {
  std::fill(score + count, score + CHUNK, -INFINITY);  // whatever lies there
  v16 most = all(-INFINITY), total{};
  for (int i = 0; i < CHUNK; i += 16) {
    v16 s = load(score + i) * scale;
    store(score + i, s);
    most = s > most ? s : most;
  }
  top = max16(most);
  for (int i = 0; i < CHUNK; i += 16) {
    v16 p = E::round(exp16(load(score + i) - top));
    E::keep(weight + i, p);
    total += p;
  }
  sum = sum16(total);
}

template <class E>
void look(const Cache<E>& cache, const Job& job, const word* query, long chunk, Part part) {
  constexpr int P = E::per_word;
  alignas(64) float score[ROWS * CHUNK];
  alignas(64) word weight[ROWS * CHUNK / P];
  int width = cache.n.head_width, most = 0, least = CHUNK;
  long first = chunk * (CHUNK / BLOCK);
  for (int r = 0; r < job.rows; ++r) {
    int count = readable(job, r, chunk);
    most = std::max(most, count), least = std::min(least, count);
  }
  for (int r = 0; r < job.rows; ++r) std::fill(score + r * CHUNK, score + r * CHUNK + (most + 31) / 32 * 32, 0.f);
  auto soon = [&](auto* pages, long index) {
    if (index * BLOCK < job.most)
      fetch(pages + cache.block(job.sequence, job.kv, index), (long)BLOCK * width * sizeof(*pages));
  };
  for (int b = 0; b * BLOCK < most; ++b) {
    const word* keys = reinterpret_cast<const word*>(cache.keys + cache.block(job.sequence, job.kv, first + b));
    (b + 1) * BLOCK < most ? soon(cache.keys, first + b + 1) : soon(cache.values, first);
    TILES<E>[job.rows - 1](query, width / P, keys, width, score + b * BLOCK, CHUNK);
  }
  float scale = 1.f / std::sqrt((float)width);
  for (int r = 0; r < job.rows; ++r)
    if (int count = readable(job, r, chunk))
      softmax<E>(score + r * CHUNK, count, scale, reinterpret_cast<typename E::Value*>(weight + r * CHUNK / P),
                 part.top[r], part.sum[r]);
  std::fill(part.out, part.out + job.rows * width, 0.f);
  for (int b = 0; b * BLOCK < most; ++b) {
    const word* values = reinterpret_cast<const word*>(cache.values + cache.block(job.sequence, job.kv, first + b));
    soon((b + 1) * BLOCK < most ? cache.values : cache.keys, first + b + 1);
    int common = std::clamp(least - b * BLOCK, 0, BLOCK) / P * P;  // keys that all rows read, in whole words
    for (int d = 0; d < width / BLOCK; ++d) {
      const word *panel = values + d * BLOCK * BLOCK / P, *p = weight + b * BLOCK / P;
      float* out = part.out + d * BLOCK;
      TILES<E>[job.rows - 1](p, CHUNK / P, panel, common, out, width);
      p += common / P, panel += common / P * BLOCK;
      for (int r = 0; r < job.rows; ++r)
        if (int rest = std::clamp(readable(job, r, chunk) - b * BLOCK, 0, BLOCK) - common; rest > 0)
          tile<E, 1>(p + r * CHUNK / P, 0, panel, rest, out + r * width, width);
    }
  }
}

void fold(const Job& job, long chunk, int width, Part all_before, Part part) {
  for (int r = 0; r < job.rows; ++r) {
    if (!readable(job, r, chunk)) continue;
    float *to = all_before.out + r * width, *from = part.out + r * width;
    if (chunk == 0) {
      all_before.top[r] = part.top[r], all_before.sum[r] = part.sum[r];
      std::copy(from, from + width, to);
      continue;
    }
    float top = std::max(all_before.top[r], part.top[r]);
    v16 a = exp16(all(all_before.top[r] - top)), b = exp16(all(part.top[r] - top));
    all_before.top[r] = top, all_before.sum[r] = all_before.sum[r] * a[0] + part.sum[r] * b[0];
    for (int i = 0; i < width; i += 16) store(to + i, fma(load(to + i), a, load(from + i) * b));
  }
}

}  // namespace
