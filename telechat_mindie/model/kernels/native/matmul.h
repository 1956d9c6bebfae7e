// Products of float activations [T, K] with weights [N, K] in their stored dtype, accumulated in float.
//
// Few tokens (decode): each weight row is read once from memory and multiplied with all tokens as dot products; memory is
// the limit. Many tokens (prefill): the tokens lie in the lanes and single weights are broadcast, so that a weight is
// widened once and neither side needs a transposed copy of the other; arithmetic is the limit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "arguments.h"
#include "pool.h"

namespace telechat {

constexpr size_t kFewTokens = 8;
constexpr size_t kPair = 2 * kLanes;

// Tokens that share a pass over the weights.
constexpr int kDotTokens = kRegisters == 32 ? 8 : 4;
// Weight rows of a pass. With few tokens memory is the limit, and the CPU's own prefetching wants one stream: a Zen 4 core
// read bfloat16 at 19 GB/s row by row, at 11.6 GB/s four rows at a time.
constexpr int dot_rows(int tokens) { return tokens > 4 ? 2 : 1; }
// Pairs of vectors of a row that are summed apart, since a sum waits four cycles for the one before it.
constexpr int dot_splits(int tokens) { return tokens >= 4 ? 1 : 4 / tokens; }
// How far ahead weights are fetched. With many tokens the CPU's own prefetching comes too late, between long stretches of
// arithmetic: asking for them took 8 tokens from 8.0 ms to 4.6 for 47 MB. With one or two it only gets in the way.
constexpr size_t prefetch_bytes(int tokens) { return tokens > 4 ? 4096 : tokens > 2 ? 1024 : 0; }

// Weight rows of a broadcast tile, two vectors of tokens wide.
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
// Weights of a row that are used at a time, so that the tokens' panels of this depth stay in the second-level cache.
constexpr size_t kDepth = 256;
// From one copied row to the next: not a power of two, which would put them all into a few sets of the cache.
constexpr size_t kCopyStride = kDepth + 16;

// Activations as the product wants them, made by `arrange` from rows that may have been normalised first.
struct Activations {
  const float* data;
  size_t tokens;
  size_t depth;   // K
  bool few;       // rows [T, stride], else panels [K, width] of tokens
  size_t stride;  // of a row, a multiple of kPair, the end zero

  // Tokens of the panel that begins at token `first`: a pair of vectors, or one where one suffices.
  size_t width(size_t first) const { return tokens - first > kLanes ? kPair : kLanes; }
  const float* panel(size_t first) const { return data + first * depth; }
};

inline float inverse_rms(const float* x, size_t count, float eps) {
  Lanes squares = zero();
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / float(count) + eps);
}

// x [T, K] for weights of type W: normalised by RMS and `norm` [K] where that is given.
template <class W, class N>
Activations arrange(const float* x, size_t tokens, size_t depth, const N* norm, float eps) {
  const size_t stride = round_up(depth, kPair);
  if (tokens <= kFewTokens) {
    float* rows = scratch<kActivations>(tokens * stride);
    for (size_t t = 0; t < tokens; ++t) {
      const float* from = x + t * depth;
      float* to = rows + t * stride;
      const float scale = norm ? inverse_rms(from, depth, eps) : 1.0f;
      for (size_t begin = 0; begin < stride; begin += kPair) {
        for (size_t i = 0; i < kPair; ++i) {
          const size_t k = begin + (Split<W>::value ? (i % kLanes) * 2 + i / kLanes : i);
          to[begin + i] = k >= depth ? 0.0f : norm ? from[k] * scale * widen(norm[k]) : from[k];
        }
      }
    }
    return {rows, tokens, depth, true, stride};
  }
  float* panels = scratch<kActivations>(round_up(tokens, kPair) * depth);
  const Activations arranged{panels, tokens, depth, false, stride};
  parallel_for((tokens + kPair - 1) / kPair, [&](size_t index) {
    const size_t first = index * kPair, width = arranged.width(first), filled = std::min(width, tokens - first);
    float scale[kPair] = {};
    for (size_t t = 0; t < filled; ++t) scale[t] = norm ? inverse_rms(x + (first + t) * depth, depth, eps) : 1.0f;
    float* to = panels + first * depth;
    for (size_t k = 0; k < depth; ++k, to += width) {
      const float weight = norm ? widen(norm[k]) : 1.0f;
      for (size_t t = 0; t < filled; ++t) to[t] = x[(first + t) * depth + k] * scale[t] * weight;
      for (size_t t = filled; t < width; ++t) to[t] = 0.0f;
    }
  });
  return arranged;
}

// to[t * stride + n] = x[t] . weight[n] for T tokens and N rows.
template <class W, int T, int N>
inline void dot_tile(const float* x, size_t x_stride, const W* weight, size_t depth, float* to, size_t stride) {
  constexpr int S = N == 1 ? dot_splits(T) : 1;
  Lanes sums[N * T * S];
#pragma GCC unroll 16
  for (int i = 0; i < N * T * S; ++i) sums[i] = zero();
  const auto step = [&](const float* xs, const W* weights, size_t weight_stride, int split) {
    Lanes first[N], second[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) load_pair(weights + n * weight_stride, &first[n], &second[n]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const Lanes low = load(xs + t * x_stride), high = load(xs + t * x_stride + kLanes);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        Lanes& sum = sums[(n * T + t) * S + split];
        sum = fma(second[n], high, fma(first[n], low, sum));
      }
    }
  };
  size_t k = 0;
  for (; k + S * kPair <= depth; k += S * kPair) {
    if (prefetch_bytes(T) > 0) {
      for (int n = 0; n < N; ++n) {
        __builtin_prefetch(reinterpret_cast<const char*>(weight + n * depth + k) + prefetch_bytes(T));
      }
    }
#pragma GCC unroll 4
    for (int split = 0; split < S; ++split) step(x + k + split * kPair, weight + k + split * kPair, depth, split);
  }
  for (; k + kPair <= depth; k += kPair) step(x + k, weight + k, depth, 0);
  if (k < depth) {  // the last weights of a row, so that nothing behind the matrix is read
    W tail[N * kPair] = {};
    for (int n = 0; n < N; ++n) std::copy_n(weight + n * depth + k, depth - k, tail + n * kPair);
    step(x + k, tail, kPair, 0);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N * T; ++i) {
    sums[i] = sums[i * S];
#pragma GCC unroll 4
    for (int split = 1; split < S; ++split) sums[i] = add(sums[i], sums[i * S + split]);
  }
  float totals[N * T + 3];
  int i = 0;
#pragma GCC unroll 4
  for (; i + 4 <= N * T; i += 4) sum_four(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], totals + i);
  for (; i < N * T; ++i) totals[i] = sum(sums[i]);
  for (int t = 0; t < T; ++t) {
    for (int n = 0; n < N; ++n) to[t * stride + n] = totals[n * T + t];
  }
}

template <class W, int T>
void dot_rows_of(const float* x, size_t x_stride, const W* weight, size_t rows, size_t depth, float* to, size_t stride) {
  constexpr int N = dot_rows(T);
  size_t n = 0;
  for (; n + N <= rows; n += N) dot_tile<W, T, N>(x, x_stride, weight + n * depth, depth, to + n, stride);
  for (; n < rows; ++n) dot_tile<W, T, 1>(x, x_stride, weight + n * depth, depth, to + n, stride);
}

template <class W>
void multiply_few(const Activations& x, const W* weight, size_t rows, float* to, size_t stride) {
  // A block of rows that stays in the cache while the tokens pass over it in groups of kDotTokens.
  const size_t block = 8;
  for (size_t n = 0; n < rows; n += block) {
    const size_t some = x.tokens > kDotTokens ? std::min(block, rows - n) : rows;
    for (size_t t = 0; t < x.tokens; t += kDotTokens) {
      const float* xs = x.data + t * x.stride;
      const W* weights = weight + n * x.depth;
      float* out = to + t * stride + n;
      switch (std::min<size_t>(kDotTokens, x.tokens - t)) {
        case 1: dot_rows_of<W, 1>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 2: dot_rows_of<W, 2>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 3: dot_rows_of<W, 3>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 4: dot_rows_of<W, 4>(xs, x.stride, weights, some, x.depth, out, stride); break;
#if defined(__AVX512F__) || defined(__aarch64__)
        case 5: dot_rows_of<W, 5>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 6: dot_rows_of<W, 6>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 7: dot_rows_of<W, 7>(xs, x.stride, weights, some, x.depth, out, stride); break;
        case 8: dot_rows_of<W, 8>(xs, x.stride, weights, some, x.depth, out, stride); break;
#endif
      }
    }
    if (some == rows) return;
  }
}

// What a tile reads weights of type W as. With AVX-512 there is time and room to widen bfloat16 between the sums; otherwise
// what is not float is widened before, once for all tokens.
template <class W>
using Tiled = std::conditional_t<std::is_same_v<W, Brain> && kLanes == 16, Brain, float>;

// `count` weights of kTileRows rows for a tile: where they lie, or else in `copy`, widened, zero where there are no `rows`.
// Changes `stride` to what it is in the copy.
template <class W>
const Tiled<W>* tile_weights(const W* weight, size_t rows, size_t count, Tiled<W>* copy, size_t* stride) {
  if constexpr (std::is_same_v<W, Tiled<W>>) {
    if (rows >= kTileRows) return weight;
  }
  for (size_t row = 0; row < kTileRows; ++row) {
    const W* from = weight + row * *stride;
    Tiled<W>* to = copy + row * kCopyStride;
    if (row >= rows) {
      std::fill_n(to, count, Tiled<W>{});
    } else if constexpr (std::is_same_v<W, Tiled<W>>) {
      std::copy_n(from, count, to);
    } else {
      size_t k = 0;
      for (; k + kLanes <= count; k += kLanes) store(to + k, load(from + k));
      for (; k < count; ++k) to[k] = widen(from[k]);
    }
  }
  *stride = kCopyStride;
  return copy;
}

// columns[n * column_stride + lane] = or, unless `first`, += the products of kTileRows weight rows with one panel, `count`
// deep.
template <class W, int Vectors>
void broadcast_tile(const W* weights, size_t weight_stride, const float* panel, size_t count, float* columns,
                    size_t column_stride, bool first) {
  constexpr size_t kSteps = kRegisters == 32 ? 2 : 1;
  Lanes sums[kTileRows * Vectors];
#pragma GCC unroll 12
  for (int n = 0; n < kTileRows; ++n) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      sums[n * Vectors + v] = first ? zero() : load(columns + n * column_stride + v * kLanes);
    }
  }
  size_t k = 0;
  if constexpr (kSteps == 2) {
    for (; k + 2 <= count; k += 2) {
      Lanes tokens[2 * Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < 2 * Vectors; ++v) tokens[v] = load(panel + (k * Vectors + v) * kLanes);
#pragma GCC unroll 12
      for (int n = 0; n < kTileRows; ++n) {
        Lanes one, two;
        splat_two(weights + n * weight_stride + k, &one, &two);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          Lanes& sum = sums[n * Vectors + v];
          sum = fma(two, tokens[Vectors + v], fma(one, tokens[v], sum));
        }
      }
    }
  }
  for (; k < count; ++k) {
    Lanes tokens[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) tokens[v] = load(panel + (k * Vectors + v) * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < kTileRows; ++n) {
      const Lanes weight = splat(widen(weights[n * weight_stride + k]));
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[n * Vectors + v] = fma(weight, tokens[v], sums[n * Vectors + v]);
    }
  }
#pragma GCC unroll 12
  for (int n = 0; n < kTileRows; ++n) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(columns + n * column_stride + v * kLanes, sums[n * Vectors + v]);
  }
}

template <class W>
void multiply_many(const Activations& x, const W* weight, size_t rows, float* to, size_t stride) {
  const size_t tile_rows = round_up(rows, kTileRows), columns_stride = round_up(x.tokens, kPair);
  const size_t panels = columns_stride / kPair;
  float* columns = scratch<kColumns>(tile_rows * columns_stride);
  alignas(64) Tiled<W> copy[kTileRows * kCopyStride];
  for (size_t begin = 0; begin < x.depth; begin += kDepth) {
    const size_t count = std::min(kDepth, x.depth - begin);
    for (size_t n = 0; n < rows; n += kTileRows) {
      size_t weight_stride = x.depth;
      const Tiled<W>* weights = tile_weights(weight + n * x.depth + begin, rows - n, count, copy, &weight_stride);
      for (size_t first = 0; first < x.tokens; first += kPair) {
        // A share of the next tile's weights: the CPU does not foresee such short pieces of rows.
        for (size_t row = first / kPair; row < kTileRows && n + kTileRows + row < rows; row += panels) {
          const char* next = reinterpret_cast<const char*>(weight + (n + kTileRows + row) * x.depth + begin);
          for (size_t byte = 0; byte < count * sizeof(W); byte += 64) __builtin_prefetch(next + byte, 0, 2);
        }
        const size_t width = x.width(first);
        const float* panel = x.panel(first) + begin * width;
        float* column = columns + n * columns_stride + first;
        if (width == kPair) {
          broadcast_tile<Tiled<W>, 2>(weights, weight_stride, panel, count, column, columns_stride, begin == 0);
        } else {
          broadcast_tile<Tiled<W>, 1>(weights, weight_stride, panel, count, column, columns_stride, begin == 0);
        }
      }
    }
  }
  // Square by square: a whole column of weight rows would not stay in the cache.
  for (size_t t = 0; t < x.tokens; t += kLanes) {
    for (size_t n = 0; n < rows; n += kLanes) {
      const float* from = columns + n * columns_stride + t;
      float* out = to + t * stride + n;
      const size_t height = std::min<size_t>(kLanes, x.tokens - t), width = std::min<size_t>(kLanes, rows - n);
      if (height == kLanes && width == kLanes) {
        transpose_square(from, columns_stride, out, stride);
        continue;
      }
      for (size_t i = 0; i < height; ++i) {
        for (size_t j = 0; j < width; ++j) out[i * stride + j] = from[j * columns_stride + i];
      }
    }
  }
}

// to[t * stride + n] = x[t] . weight[n] for the first `rows` rows of `weight` [., K].
template <class W>
void multiply(const Activations& x, const W* weight, size_t rows, float* to, size_t stride) {
  if (x.few) {
    multiply_few(x, weight, rows, to, stride);
  } else {
    multiply_many(x, weight, rows, to, stride);
  }
}

// to[i] = silu(gate[i]) * up[i]. `gate` and `up` are readable up to a whole vector; `to` is written up to `count`.
inline void swiglu(const float* gate, const float* up, size_t count, float* to) {
  for (size_t i = 0; i < count; i += kLanes) {
    const Lanes g = load(gate + i);
    const Lanes silu = divide(g, add(splat(1.0f), exponential(mul(g, splat(-1.0f)))));
    const Lanes gated = mul(silu, load(up + i));
    if (i + kLanes <= count) {
      store(to + i, gated);
    } else {
      float last[kLanes];
      store(last, gated);
      std::copy_n(last, count - i, to + i);
    }
  }
}

// Splits `rows` into chunks, about eight a thread so that a thread that is held up costs little, and calls
// body(first, count) for each.
template <class Body>
void for_row_chunks(size_t rows, Body&& body) {
  const size_t chunks = thread_count() * 8, wanted = std::max<size_t>(1, (rows + chunks - 1) / chunks);
  const size_t size = std::min<size_t>(round_up(wanted, kTileRows), kTileRows * 8);
  parallel_for((rows + size - 1) / size,
               [&](size_t index) { body(index * size, std::min(size, rows - index * size)); });
}

}  // namespace telechat
