// Rotary embedding, cache write and attention over the paged context, for tokens of any number of sequences at once.
//
// The new tokens' own keys and values are read from the call, not from the cache: a token that is not to be written is
// still seen by its sequence. They are rounded to the cache's dtype all the same, so that a token's logits do not depend
// on which of the tokens before it came in the same call. Softmax runs over blocks of keys with a running maximum
// (Milakov and Gimelshein, "Online normalizer calculation for softmax"), so that scratch does not grow with the context.
#include <limits>
#include <vector>

#include "attention_tiles.h"
#include "layers.h"
#include "pool.h"

namespace telechat {
namespace {

// Query rows (tokens x heads of a group) that a task aims at.
constexpr size_t kQueryRows = 16;
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// A row of the sequences' table: where its new tokens stand in the call, and its blocks.
struct Sequence {
  size_t first;    // token of the call
  size_t count;    // new tokens
  size_t context;  // with the new ones
  const int32_t* blocks;
};

struct Problem {
  size_t tokens, heads, kv_heads, head_dim, block_size, cache_rows;
  std::vector<Sequence> sequences;
  const int32_t* slots;
  const float* rotary;
  const float* qkv;
  const bool* mask;  // [tokens, mask_width], or null: causal
  size_t mask_width;
  float* out;

  size_t width() const { return kv_heads * head_dim; }
  size_t packed() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Query rows of a task, its context block by block.
struct Task {
  size_t sequence;
  size_t first;  // among the sequence's new tokens
  size_t count;
  size_t kv_head;
};

template <class C>
class Attention {
 public:
  Attention(const Problem& problem, C* keys, C* values)
      : problem_(problem), keys_(keys), values_(values), depth_(round_up(problem.head_dim, kLanes)) {
    const size_t queries = problem.tokens * problem.heads * problem.head_dim, rows = problem.tokens * problem.width();
    queries_ = scratch<kRotated>(queries + 2 * rows);
    new_keys_ = reinterpret_cast<C*>(queries_ + queries);
    new_values_ = reinterpret_cast<C*>(queries_ + queries + rows);
  }

  void run() {
    const size_t group = problem_.heads / problem_.kv_heads;
    const size_t tile = std::max<size_t>(1, kQueryRows / group);
    std::vector<Task> tasks;
    for (size_t s = problem_.sequences.size(); s-- > 0;) {
      const Sequence& sequence = problem_.sequences[s];
      for (size_t first = 0; first < sequence.count; first += tile) {
        for (size_t head = 0; head < problem_.kv_heads; ++head) {
          tasks.push_back({s, first, std::min(tile, sequence.count - first), head});
        }
      }
      clear(sequence.first + sequence.count, s + 1 < problem_.sequences.size() ? problem_.sequences[s + 1].first
                                                                               : problem_.tokens);
    }
    clear(0, problem_.sequences.empty() ? problem_.tokens : problem_.sequences[0].first);
    parallel_for((problem_.tokens + 7) / 8, [&](size_t index) {
      for (size_t t = index * 8; t < std::min(index * 8 + 8, problem_.tokens); ++t) enter(t);
    });
    parallel_for(tasks.size(), [&](size_t index) { attend(tasks[index]); });
  }

 private:
  void clear(size_t begin, size_t end) {  // tokens of no sequence
    const size_t size = problem_.heads * problem_.head_dim;
    if (begin < end) std::fill_n(problem_.out + begin * size, (end - begin) * size, 0.0f);
  }

  // Rotates a token's query and key, rounds key and value, and writes them to its slot.
  void enter(size_t token) {
    const size_t dim = problem_.head_dim, width = problem_.width();
    const float* qkv = problem_.qkv + token * problem_.packed();
    const float* rotary = problem_.rotary + token * dim;
    float* query = queries_ + token * problem_.heads * dim;
    float* key = scratch<kTile>(dim);
    const float scale = 1.0f / std::sqrt(float(dim));
    for (size_t h = 0; h < problem_.heads; ++h) rotate(qkv + h * dim, rotary, dim, scale, query + h * dim);
    qkv += problem_.heads * dim;
    C* new_key = new_keys_ + token * width;
    C* new_value = new_values_ + token * width;
    for (size_t h = 0; h < problem_.kv_heads; ++h) {
      rotate(qkv + h * dim, rotary, dim, 1.0f, key);
      for (size_t d = 0; d < dim; ++d) narrow(key[d], new_key + h * dim + d);
    }
    for (size_t i = 0; i < width; ++i) narrow(qkv[width + i], new_value + i);
    if (problem_.slots[token] < 0) return;
    const size_t row = size_t(problem_.slots[token]) * width;
    std::copy_n(new_key, width, keys_ + row);
    std::copy_n(new_value, width, values_ + row);
  }

  // The query rows of a task, and what they have gathered from the keys and values so far.
  struct Rows {
    const Task& task;
    const Sequence& sequence;
    size_t count;
    float* queries;
    float* sums;
    float* scores;
    float* peaks;
    float* totals;
    float* fades;
  };

  void attend(const Task& task) {
    const Sequence& sequence = problem_.sequences[task.sequence];
    const size_t dim = problem_.head_dim, group = problem_.heads / problem_.kv_heads, count = task.count * group;
    const size_t history = sequence.context - sequence.count;
    float* queries = scratch<kTile>(count * (2 * depth_ + kKeys + 3) + 2 * kKeys * depth_);
    float* sums = queries + count * depth_;
    float* copies = sums + count * depth_;
    float* scores = copies + 2 * kKeys * depth_;
    float* peaks = scores + count * kKeys;
    float* totals = peaks + count;
    const Rows rows{task, sequence, count, queries, sums, scores, peaks, totals, totals + count};
    for (size_t r = 0; r < count; ++r) {
      const size_t token = sequence.first + task.first + r / group, head = task.kv_head * group + r % group;
      std::copy_n(queries_ + (token * problem_.heads + head) * dim, dim, queries + r * depth_);
      std::fill(queries + r * depth_ + dim, queries + (r + 1) * depth_, 0.0f);
      peaks[r] = kUnseen;
      totals[r] = 0.0f;
    }
    std::fill_n(sums, count * depth_, 0.0f);
    const size_t limit = problem_.mask ? sequence.context : history + task.first + task.count;
    for (size_t begin = 0; begin < limit; begin += kKeys) {
      const size_t end = std::min(begin + kKeys, limit);
      const C *keys[kKeys], *values[kKeys];
      for (size_t j = begin; j < end; ++j) locate(sequence, j, task.kv_head, &keys[j - begin], &values[j - begin]);
      if (depth_ == dim) {  // 16-bit rows are widened where they are used: a copy costs more, for any number of queries
        absorb(rows, keys, values, begin, end - begin);
      } else {
        const float *padded_keys[kKeys], *padded_values[kKeys];
        for (size_t j = 0; j < end - begin; ++j) {
          padded_keys[j] = pad(keys[j], copies + j * depth_);
          padded_values[j] = pad(values[j], copies + (kKeys + j) * depth_);
        }
        absorb(rows, padded_keys, padded_values, begin, end - begin);
      }
    }
    for (size_t r = 0; r < count; ++r) {
      const size_t token = sequence.first + task.first + r / group, head = task.kv_head * group + r % group;
      float* to = problem_.out + (token * problem_.heads + head) * dim;
      const float scale = totals[r] > 0.0f ? 1.0f / totals[r] : totals[r];  // 0 where nothing is seen; NaN stays
      for (size_t d = 0; d < dim; ++d) to[d] = sums[r * depth_ + d] * scale;
    }
  }

  // Takes `count` keys and values of the context, from position `begin` on, into account.
  template <class T>
  void absorb(const Rows& rows, const T* const* keys, const T* const* values, size_t begin, size_t count) const {
    const size_t group = problem_.heads / problem_.kv_heads, history = rows.sequence.context - rows.sequence.count;
    const auto score = [&](auto height, size_t r) {
      score_rows<decltype(height)::value>(rows.queries + r * depth_, depth_, keys, count, rows.scores + r * kKeys);
    };
    const auto mix = [&](auto height, size_t r) {
      mix_rows<decltype(height)::value>(rows.scores + r * kKeys, rows.fades + r, depth_, values, count,
                                        rows.sums + r * depth_);
    };
    in_pairs(rows.count, score);
    for (size_t r = 0; r < rows.count; ++r) {
      const size_t index = rows.task.first + r / group;
      weigh(rows.sequence.first + index, history + index, begin, count, rows.scores + r * kKeys, &rows.peaks[r],
            &rows.totals[r], &rows.fades[r]);
    }
    in_pairs(rows.count, mix);
  }

  // Calls body(2, r) for each two rows, body(1, r) for the last of an odd number.
  template <class Body>
  static void in_pairs(size_t rows, const Body& body) {
    size_t r = 0;
    for (; r + 2 <= rows; r += 2) body(std::integral_constant<int, 2>(), r);
    if (r < rows) body(std::integral_constant<int, 1>(), r);
  }

  // Where key and value of a position of the context lie: in this call, or in the cache.
  void locate(const Sequence& sequence, size_t position, size_t kv_head, const C** key, const C** value) const {
    const size_t history = sequence.context - sequence.count, offset = kv_head * problem_.head_dim;
    if (position >= history) {
      const size_t from = (sequence.first + position - history) * problem_.width() + offset;
      *key = new_keys_ + from;
      *value = new_values_ + from;
    } else {
      const size_t block = size_t(sequence.blocks[position / problem_.block_size]);
      const size_t row = block * problem_.block_size + position % problem_.block_size;
      *key = keys_ + row * problem_.width() + offset;
      *value = values_ + row * problem_.width() + offset;
    }
  }

  // A row copied to `copy` [depth_], with zeros behind it.
  const float* pad(const C* from, float* copy) const {
    const size_t dim = problem_.head_dim;
    size_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(copy + d, load(from + d));
    for (; d < dim; ++d) copy[d] = widen(from[d]);
    for (; d < depth_; ++d) copy[d] = 0.0f;
    return copy;
  }

  // Scores of one query row become weights relative to the largest so far; `fade` is what earlier weights shrink by.
  void weigh(size_t token, size_t position, size_t begin, size_t count, float* scores, float* peak, float* total,
             float* fade) const {
    if (problem_.mask) {
      const bool* seen = problem_.mask + token * problem_.mask_width + begin;
      for (size_t j = 0; j < count; ++j) scores[j] = seen[j] ? scores[j] : kUnseen;
    } else {
      for (size_t j = position >= begin ? position - begin + 1 : 0; j < count; ++j) scores[j] = kUnseen;
    }
    for (size_t j = count; j < round_up(count, kLanes); ++j) scores[j] = kUnseen;
    Lanes top = load(scores);
    for (size_t j = kLanes; j < count; j += kLanes) top = maximum(top, load(scores + j));
    const float raised = std::max(*peak, largest(top));
    if (raised == kUnseen) {  // nothing seen yet, or nothing but NaN, which a maximum passes over
      for (size_t j = 0; j < count; ++j) {
        if (std::isnan(scores[j])) *total = scores[j];
        scores[j] = 0.0f;
      }
      *fade = 1.0f;
      return;
    }
    *fade = *peak == kUnseen ? 0.0f : std::exp(*peak - raised);
    *peak = raised;
    Lanes added = zero();
    for (size_t j = 0; j < count; j += kLanes) {
      const Lanes weights = exponential(add(load(scores + j), splat(-raised)));
      store(scores + j, weights);
      added = add(added, weights);
    }
    *total = *total * *fade + sum(added);
  }

  const Problem& problem_;
  C* keys_;
  C* values_;
  size_t depth_;  // head_dim rounded up to whole vectors
  float* queries_;
  C* new_keys_;  // of the call's tokens, like a cache's rows
  C* new_values_;
};

// The sequences' table [B, 3 + W]: first token, new tokens, context, then the blocks. A row without new tokens is padding.
std::vector<Sequence> read_sequences(const Argument& table, const Problem& problem) {
  const size_t columns = table.size(1);
  expect(columns >= 3, "sequences have fewer than three columns");
  std::vector<Sequence> found;
  size_t end = 0;
  for (size_t s = 0; s < table.size(0); ++s) {
    const int32_t* row = table.as<const int32_t>() + s * columns;
    if (row[1] == 0) continue;
    expect(row[0] >= 0 && row[1] > 0 && row[2] >= row[1], "a sequence has a negative length");
    const Sequence sequence{size_t(row[0]), size_t(row[1]), size_t(row[2]), row + 3};
    expect(sequence.first >= end && sequence.first + sequence.count <= problem.tokens,
           "a sequence's tokens lie outside the call or overlap");
    end = sequence.first + sequence.count;
    const size_t history = sequence.context - sequence.count;
    const size_t blocks = (history + problem.block_size - 1) / problem.block_size;
    expect(blocks <= columns - 3, "a sequence has too few blocks");
    for (size_t b = 0; b < blocks; ++b) {
      const int32_t block = sequence.blocks[b];
      if (block < 0 || (size_t(block) + 1) * problem.block_size > problem.cache_rows) {
        throw Fault{"block " + std::to_string(block) + " lies outside the cache"};
      }
    }
    expect(!problem.mask || sequence.context <= problem.mask_width, "the mask is narrower than a context");
    found.push_back(sequence);
  }
  return found;
}

}  // namespace

void attention(const Argument& qkv, const Argument& keys, const Argument& values, const Context& context,
               const Argument& out) {
  Problem problem{};
  problem.tokens = qkv.size(0);
  problem.head_dim = context.rotary.size(1);
  expect(problem.head_dim > 0 && problem.head_dim % 2 == 0, "head dimension is odd");
  expect(keys.size(1) > 0 && keys.size(1) % problem.head_dim == 0, "cache width is not whole heads");
  problem.kv_heads = keys.size(1) / problem.head_dim;
  expect(out.size(1) > 0 && out.size(1) % keys.size(1) == 0, "heads are not a multiple of the kv heads");
  problem.heads = out.size(1) / problem.head_dim;
  expect(qkv.size(1) == problem.packed(), "qkv has the wrong width");
  expect(values.size(0) == keys.size(0) && values.size(1) == keys.size(1), "the caches differ in shape");
  expect(context.rotary.size(0) == problem.tokens && context.slots.size(0) == problem.tokens &&
             out.size(0) == problem.tokens,
         "inputs differ in tokens");
  expect(context.block_size.size(0) == 1 && *context.block_size.as<const int32_t>() > 0, "block size is not positive");
  problem.block_size = size_t(*context.block_size.as<const int32_t>());
  problem.cache_rows = keys.size(0);
  problem.slots = context.slots.as<const int32_t>();
  for (size_t t = 0; t < problem.tokens; ++t) {
    if (problem.slots[t] < -1 || problem.slots[t] >= int64_t(problem.cache_rows)) {
      throw Fault{"slot " + std::to_string(problem.slots[t]) + " lies outside the cache"};
    }
  }
  if (context.mask) {
    expect(context.mask->size(0) == problem.tokens, "inputs differ in tokens");
    problem.mask = context.mask->as<const bool>();
    problem.mask_width = context.mask->size(1);
  }
  problem.sequences = read_sequences(context.sequences, problem);
  problem.rotary = context.rotary.as<const float>();
  problem.qkv = qkv.as<const float>();
  problem.out = out.as<float>();
  with_stored(keys, "cache", [&](auto* stored) {
    using C = std::decay_t<decltype(*stored)>;
    Attention<C>(problem, keys.as<C>(), values.as<C>()).run();
  });
}

// qkv [T, (heads + 2 kv heads) * D], key and value cache, then a Context's members -> [T, heads * D]
TELECHAT_KERNEL(telechat_attention) {
  return guarded("attention", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(8, 9);
    const bool masked = count == 9;
    const Argument mask = masked ? arguments.get(7, 2, Dtype::kBool, "mask") : Argument{};
    const Argument keys = arguments.get(1, 2, "key cache"), values = arguments.get(2, 2, keys.dtype, "value cache");
    const Context context{arguments.floats(3, 2, "rotary"), arguments.get(4, 1, Dtype::kInt, "slots"),
                          arguments.get(5, 2, Dtype::kInt, "sequences"),
                          arguments.get(6, 1, Dtype::kInt, "block size"), masked ? &mask : nullptr};
    attention(arguments.floats(0, 2, "qkv"), keys, values, context, arguments.floats(count - 1, 2, "output"));
  });
}

}  // namespace telechat
