// The trunk of the network on a CPU: what a token gets is a function of its own row, place and readable keys alone.
//
// Exact by construction. Products sum in one order (native_product.h), attention folds chunks of a row's own keys in one
// order (native_attention.h). Hence neither neighbours, nor how a prompt is cut, nor pages, nor threads can change a bit.
//
// T tokens, D width, H query heads, G key-value heads, K head width, F MLP width, V vocabulary.

#include "native_eight.h"
#include "native_lora.h"
#include "native_pack.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

// ---- the forward ----

struct Room {  // what a call needs beside its arguments
  Rows normed, seen, inner;
  float *qkv, *gates, *parts;
  word *query, *narrowed, *row_words;
  int *first, *count, runs = 0;
  long bytes;

  Room(const Network& n, const Call& c, long chunks, char* base) {
    int tokens = c.tokens, threads = c.threads;
    char* at = base;
    long heads = n.heads + 2 * n.kv_heads;
    normed = take_rows(at, n.layer->qkv.kind, n.width, tokens);
    seen = take_rows(at, n.layer->out.kind, n.heads * n.head_width, tokens);
    inner = take_rows(at, n.layer->down.kind, n.mlp_width, tokens);
    qkv = take<float>(at, tokens * heads * n.head_width);
    gates = take<float>(at, (long)threads * tokens * BLOCK);
    query = take<word>(at, (long)tokens * n.heads * n.head_width);
    parts = take<float>(at, (4 * threads * chunks + threads * 2) * Part::size(n));
    long widest_row = std::max({n.width, n.heads * n.head_width, n.mlp_width});
    narrowed = take<word>(at, c.adapters ? tokens * Lora::row_bytes(c.widest) / 4 : 0);
    row_words = take<word>(at, c.adapters ? threads * widest_row / 2 : 0);
    first = take<int>(at, tokens), count = take<int>(at, tokens);
    bytes = at - base;
  }
};

struct Forward {
  const Network& n;
  const Call& c;
  Room& room;
  int shared, pieces, jobs;  // query heads of a key-value head, jobs of a run and key-value head, jobs of all
  long chunks;

  Forward(const Network& n, const Call& c, Room& room, long chunks) : n(n), c(c), room(room), chunks(chunks) {
    shared = n.heads / n.kv_heads, pieces = (shared + ROWS - 1) / ROWS;
    int longest = std::max(1, ROWS / shared);
    for (int t = 0; t < c.tokens; ++t) {
      bool same = t && c.sequence[t] == c.sequence[t - 1] && room.count[room.runs - 1] < longest;
      if (!same) room.first[room.runs] = t, room.count[room.runs++] = 0;
      ++room.count[room.runs - 1];
    }
    jobs = room.runs * n.kv_heads * pieces;
  }

  Job job(int index) const {
    Job j{};
    int run = index / pieces / n.kv_heads, begin = index % pieces * ROWS;
    j.kv = index / pieces % n.kv_heads, j.rows = std::min(room.count[run] * shared - begin, ROWS);
    j.sequence = c.sequence[room.first[run]];
    for (int r = 0; r < j.rows; ++r) {
      j.token[r] = room.first[run] + (begin + r) / shared, j.head[r] = j.kv * shared + (begin + r) % shared;
      j.end[r] = c.end[j.token[r]], j.most = std::max(j.most, j.end[r]);
    }
    return j;
  }

  template <class E>
  void queries(const Job& j, word* to) const {
    long words = Cache<E>::words(n);
    for (int r = 0; r < j.rows; ++r)
      std::memcpy(to + r * words, room.query + ((long)j.token[r] * n.heads + j.head[r]) * words, words * 4);
  }

  void finish(const Job& j, Part part) const {
    for (int r = 0; r < j.rows; ++r) {
      v16 size = all(1.f / part.sum[r]);
      const float* out = part.out + r * n.head_width;
      for (int i = 0; i < n.head_width; i += BLOCK)
        room.seen.keep(j.token[r], (j.head[r] * n.head_width + i) / BLOCK, load(out + i) * size,
                       load(out + i + 16) * size);
    }
  }

  // Where jobs are few, threads share out their chunks; the parts and the order in which they are folded stay the same.
  template <class E>
  void attend(const Cache<E>& cache, const Thread& thread) const {
    alignas(64) word query[ROWS * MAX_HEAD_WIDTH];
    long size = Part::size(n), split = jobs < 4 * thread.team.size ? chunks : 1;
    float* own = room.parts + (4 * thread.team.size * chunks + 2 * thread.index) * size;
    for (int ticket; (ticket = thread.team.ticket.fetch_add(1)) < jobs * split;) {
      Job j = job(jobs - 1 - (int)(ticket / split));
      if (split > 1 && ticket % split * CHUNK >= j.most) continue;
      queries<E>(j, query);
      if (split > 1) {
        look(cache, j, query, ticket % split, Part(room.parts + ticket * size));
        continue;
      }
      for (long chunk = 0; chunk * CHUNK < j.most; ++chunk) {
        look(cache, j, query, chunk, Part(own + size));
        fold(j, chunk, n.head_width, Part(own), Part(own + size));
      }
      finish(j, Part(own));
    }
    if (split == 1) return;
    thread.meet();
    for (long index = thread.share(jobs).first; index < thread.share(jobs).last; ++index) {
      Job j = job((int)(jobs - 1 - index));
      for (long chunk = 0; chunk * CHUNK < j.most; ++chunk)
        fold(j, chunk, n.head_width, Part(own), Part(room.parts + (index * split + chunk) * size));
      finish(j, Part(own));
    }
  }

  template <class E>
  void place(const Cache<E>& cache, const Layer& layer, long token, int head) const {
    int width = n.head_width, half = width / 2;
    float* x = room.qkv + (token * (n.heads + 2 * n.kv_heads) + head) * width;
    int kv = head - n.heads;
    if (kv >= n.kv_heads) return cache.write(cache.values, (int)token, kv - n.kv_heads, x);
    if (const float* weight = kv < 0 ? layer.q_norm : layer.k_norm) {
      v16 size = all(inverse_root(x, width, n.epsilon));
      for (int i = 0; i < width; i += 16) store(x + i, load(x + i) * size * load(weight + i));
    }
    for (int i = 0; i < half; i += 16) {
      v16 a = load(x + i), b = load(x + half + i);
      v16 cos = load(c.cos + token * half + i), sin = load(c.sin + token * half + i);
      store(x + i, a * cos - b * sin), store(x + half + i, b * cos + a * sin);
    }
    if (kv >= 0) return cache.write(cache.keys, (int)token, kv, x);
    cache.keep_query(room.query + (token * n.heads + head) * Cache<E>::words(n), x);
  }

  template <class E>
  void run(const Thread& thread) const {
    long T = c.tokens, D = n.width, heads = n.heads + 2 * n.kv_heads;
    Range rows = thread.share(T);
    std::copy(c.x + rows.first * D, c.x + rows.last * D, c.hidden + rows.first * D);
    long row_words = std::max({n.width, n.heads * n.head_width, n.mlp_width}) / 2;
    Lora lora{c.adapters, c.sequence, room.narrowed, room.row_words + thread.index * row_words, c.widest};
    auto add = [&](long row, int panel, float* o) {
      lora.widen(row, panel, o);
      float* to = c.hidden + row * D + panel * BLOCK;
      store(to, load(to) + load(o)), store(to + 16, load(to + 16) + load(o + 16));
    };
    float* gates = room.gates + thread.index * T * BLOCK;
    for (int l = 0; l < n.layers; ++l) {
      const Layer& layer = n.layer[l];
      Cache<E> cache(n, c, l);
      for (long t = rows.first; t < rows.last; ++t) norm(c.hidden + t * D, layer.norm, D, n.epsilon, room.normed, t);
      lora.go(l, QKV), lora.narrow(room.normed, rows);
      thread.meet();
      product(layer.qkv, room.normed, T, thread.share(layer.qkv.outputs / BLOCK), [&](long row, int panel, float* o) {
        lora.widen(row, panel, o);
        std::copy(o, o + BLOCK, room.qkv + row * heads * n.head_width + panel * BLOCK);
      });
      thread.meet();
      if (thread.index == 0) thread.team.ticket = 0;
      Range placed = thread.share(T * heads);
      for (long i = placed.first; i < placed.last; ++i) place(cache, layer, i / heads, (int)(i % heads));
      thread.meet();
      attend(cache, thread);
      thread.meet();
      lora.go(l, OUT);
      if (lora.of) lora.narrow(room.seen, rows), thread.meet();
      product(layer.out, room.seen, T, thread.share(D / BLOCK), add);
      thread.meet();
      for (long t = rows.first; t < rows.last; ++t)
        norm(c.hidden + t * D, layer.late_norm, D, n.epsilon, room.normed, t);
      lora.go(l, GATE_UP), lora.narrow(room.normed, rows);
      thread.meet();
      Range pairs = thread.share(n.mlp_width / BLOCK);  // a panel of gates, then the same 32 of what they let through
      product(layer.gate_up, room.normed, T, {2 * pairs.first, 2 * pairs.last}, [&](long row, int panel, float* o) {
        lora.widen(row, panel, o);
        float* gate = gates + row * BLOCK;
        if (panel % 2 == 0) return (void)std::copy(o, o + BLOCK, gate);
        v16 a = load(gate), b = load(gate + 16);
        a = a / (1.f + exp16(-a)) * load(o), b = b / (1.f + exp16(-b)) * load(o + 16);
        room.inner.keep(row, panel / 2, a, b);
      });
      thread.meet();
      lora.go(l, DOWN);
      if (lora.of) lora.narrow(room.inner, rows), thread.meet();
      product(layer.down, room.inner, T, thread.share(D / BLOCK), add);
      thread.meet();
    }
  }
};

long chunks_of(const Call& c) {
  int most = *std::max_element(c.end, c.end + c.tokens);
  return (most + CHUNK - 1) / CHUNK;
}

bool holds(const Call& c) {  // whether every index lies within what it indexes
  for (int t = 0; t < c.tokens; ++t) {
    if (c.sequence[t] < 0 || c.sequence[t] >= c.sequences || c.slot[t] < 0 || c.end[t] <= c.slot[t]) return false;
    if (c.end[t] > (long)c.max_pages * c.page) return false;
    const int32_t* table = c.tables + (long)c.sequence[t] * c.max_pages;
    for (int p = 0; (long)p * c.page < c.end[t]; ++p)
      if (table[p] < 0 || table[p] >= c.num_pages) return false;
  }
  return true;
}

}  // namespace

extern "C" {

long litchi_room(const Network* n, const Call* c) {
  return Room(*n, *c, chunks_of(*c), nullptr).bytes;
}

// 0, or 1 if an index lies outside of what it indexes.
int litchi_run(const Network* n, const Call* c) {
  if (!holds(*c)) return 1;
  long chunks = chunks_of(*c);
  Room room(*n, *c, chunks, c->room);
  Forward forward(*n, *c, room, chunks);
  Team team{0};
#pragma omp parallel num_threads(c->threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    Thread thread{team, omp_get_thread_num()};
    switch (n->kv_kind) {
      case F32: forward.run<Single>(thread); break;
      case BF16: forward.run<Half>(thread); break;
      default: forward.run<Eight>(thread);
    }
  }
  return 0;
}

long litchi_head_room(const Network* n, int rows) { return Rows::bytes(n->width, rows); }

void litchi_head(const Network* n, const float* x, int rows, int normed_before, float* logits, int threads, char* room) {
  Rows normed = take_rows(room, n->head.kind, n->width, rows);
  Team team{0};
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team.size = omp_get_num_threads();
    Thread thread{team, omp_get_thread_num()};
    Range own = thread.share(rows);
    const float* weight = normed_before ? nullptr : n->norm;
    for (long t = own.first; t < own.last; ++t) norm(x + t * n->width, weight, n->width, n->epsilon, normed, t);
    thread.meet();
    long V = n->head.outputs;
    product(n->head, normed, rows, thread.share((V + BLOCK - 1) / BLOCK), [&](long row, int panel, float* o) {
      std::copy(o, o + std::min(V - (long)panel * BLOCK, (long)BLOCK), logits + row * V + panel * BLOCK);
    });
  }
}

long litchi_packed(int outputs, int inner, int kind) {
  Matrix m{nullptr, nullptr, kind, inner, outputs, 0};
  return panel_bytes(m) * ((outputs + BLOCK - 1) / BLOCK);
}

// Every `step`th panel at `to`, so that matrices can take turns.
void litchi_pack(const float* weight, int outputs, int inner, int kind, char* to, int step, int threads) {
  Matrix m{to, nullptr, kind, inner, outputs, 0};
#pragma omp parallel for num_threads(threads)
  for (long panel = 0; panel < (outputs + BLOCK - 1) / BLOCK; ++panel)
    pack_panel(weight, m, panel, to + panel * step * panel_bytes(m));
}

// Of 4 bits, for groups of 32 values (rows, 32) whose misses count so much each. oracle: rounding.search
void litchi_fit(const float* values, const float* worth, long rows, float* scale, float* least, int threads) {
  Worth counted{worth, 0.f};
  for (int i = 0; i < BLOCK; ++i) counted.total += worth[i];
#pragma omp parallel for num_threads(threads)
  for (long part = 0; part < (rows + 255) / 256; ++part) {
    long at = part * 256;
    fit_rows(values + at * BLOCK, counted, std::min(256L, rows - at), scale + at, least + at);
  }
}

void litchi_trim() {  // what has been freed goes back to the system
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

void litchi_settle(void* at, long bytes) {  // large pages for what is read whole for every token
#if defined(__linux__)
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
}
}
