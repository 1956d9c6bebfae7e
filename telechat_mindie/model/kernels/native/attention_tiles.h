// The arithmetic of attention, on rows that lie anywhere: rotation, scores, and the weighted sum of values.
#pragma once

#include <algorithm>
#include <type_traits>

#include "arguments.h"

namespace telechat {

constexpr size_t kKeys = 64;  // keys of a block, the stride of its scores

// x rotated by the pairs (i, i + D / 2), then scaled; `rotary` is D / 2 cosines, D / 2 sines.
inline void rotate(const float* x, const float* rotary, size_t head_dim, float scale, float* to) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half], cosine = rotary[i], sine = rotary[i + half];
    to[i] = (a * cosine - b * sine) * scale;
    to[i + half] = (b * cosine + a * sine) * scale;
  }
}

// The scores of R query rows with `count` keys; `depth` is a multiple of kLanes.
template <int R, class T>
void score_rows(const float* query, size_t depth, const T* const* keys, size_t count, float* scores) {
  for (size_t j = 0; j < count; j += 4) {
    // The last keys of a block are repeated to make four; the surplus scores are not read.
    const T* four[4];
    for (size_t i = 0; i < 4; ++i) four[i] = keys[std::min(j + i, count - 1)];
    Lanes sums[R * 4];
#pragma GCC unroll 8
    for (int i = 0; i < R * 4; ++i) sums[i] = zero();
    for (size_t d = 0; d < depth; d += kLanes) {
      Lanes part[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) part[r] = load(query + r * depth + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Lanes key = load(four[i] + d);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) sums[r * 4 + i] = fma(part[r], key, sums[r * 4 + i]);
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      sum_four(sums[r * 4], sums[r * 4 + 1], sums[r * 4 + 2], sums[r * 4 + 3], scores + r * kKeys + j);
    }
  }
}

// sums[r] = sums[r] * fades[r] + weights[r] . values, for R rows and `count` values.
template <int R, class T>
void mix_rows(const float* weights, const float* fades, size_t depth, const T* const* values, size_t count,
              float* sums) {
  constexpr int kVectors = 4;
  for (size_t d = 0; d < depth; d += kVectors * kLanes) {
    const int vectors = int(std::min<size_t>(kVectors, (depth - d) / kLanes));
    const auto pass = [&](auto width) {
      constexpr int V = decltype(width)::value;
      Lanes mixed[R * V];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          mixed[r * V + v] = mul(load(sums + r * depth + d + v * kLanes), splat(fades[r]));
        }
      }
      for (size_t j = 0; j < count; ++j) {
        Lanes weight[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) weight[r] = splat(weights[r * kKeys + j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Lanes value = load(values[j] + d + v * kLanes);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) mixed[r * V + v] = fma(weight[r], value, mixed[r * V + v]);
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(sums + r * depth + d + v * kLanes, mixed[r * V + v]);
      }
    };
    switch (vectors) {
      case 1: pass(std::integral_constant<int, 1>()); break;
      case 2: pass(std::integral_constant<int, 2>()); break;
      case 3: pass(std::integral_constant<int, 3>()); break;
      default: pass(std::integral_constant<int, kVectors>()); break;
    }
  }
}

}  // namespace telechat
