// The feed-forward of a mixture of experts: each token goes through the experts that its gates choose, and no other.
#include <algorithm>
#include <vector>

#include "layers.h"
#include "matmul.h"

namespace telechat {
namespace {

// Tokens of an expert that share one pass over its weights; times kColumnVectors accumulators.
constexpr int kGroup = 4;
constexpr int kColumnVectors = 4;
constexpr size_t kColumnTile = kColumnVectors * kLanes;

// A token that chose an expert.
struct Pair {
  size_t token;
  float gate;
};

// to[i][n] = x[i] . weight[:, n] for T rows of x [., K] and kColumnTile columns; `weight` has `stride` columns in all.
template <class W, int T>
void column_tile(const float* const* x, const W* weight, size_t depth, size_t stride, float* to) {
  Lanes sums[T * kColumnVectors];
#pragma GCC unroll 16
  for (int i = 0; i < T * kColumnVectors; ++i) sums[i] = zero();
  for (size_t k = 0; k < depth; ++k) {
    Lanes columns[kColumnVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kColumnVectors; v += 2) {
      load_pair(weight + k * stride + v * kLanes, &columns[v], &columns[v + 1]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const Lanes activation = splat(x[t][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumnVectors; ++v) {
        sums[t * kColumnVectors + v] = fma(activation, columns[v], sums[t * kColumnVectors + v]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int v = 0; v < kColumnVectors; v += 2) {
      float both[kPair];
      store(both, sums[t * kColumnVectors + v]);
      store(both + kLanes, sums[t * kColumnVectors + v + 1]);
      float* out = to + t * kColumnTile + v * kLanes;
      for (size_t i = 0; i < kPair; ++i) {
        out[Split<W>::value ? (i % kLanes) * 2 + i / kLanes : i] = both[i];
      }
    }
  }
}

// The same for `columns` <= kColumnTile of them at the right edge of the matrix.
template <class W>
void column_edge(const float* const* x, int tokens, const W* weight, size_t depth, size_t stride, size_t columns,
                 float* to) {
  for (int t = 0; t < tokens; ++t) {
    float* out = to + t * kColumnTile;
    std::fill_n(out, kColumnTile, 0.0f);
    for (size_t k = 0; k < depth; ++k) {
      for (size_t n = 0; n < columns; ++n) out[n] += x[t][k] * widen(weight[k * stride + n]);
    }
  }
}

template <class W>
void multiply_columns(const float* const* x, int tokens, const W* weight, size_t depth, size_t stride, size_t columns,
                      float* to) {
  if (columns < kColumnTile) return column_edge(x, tokens, weight, depth, stride, columns, to);
  switch (tokens) {
    case 1: return column_tile<W, 1>(x, weight, depth, stride, to);
    case 2: return column_tile<W, 2>(x, weight, depth, stride, to);
    case 3: return column_tile<W, 3>(x, weight, depth, stride, to);
    default: return column_tile<W, kGroup>(x, weight, depth, stride, to);
  }
}

// Calls body(first pair, tokens) for the pairs [begin, end) in groups of kGroup.
template <class Body>
void for_groups(size_t begin, size_t end, Body&& body) {
  for (size_t pair = begin; pair < end; pair += kGroup) body(pair, int(std::min<size_t>(kGroup, end - pair)));
}

template <class W>
void mix(const Argument& x, const Argument& gates, const W* gate, const W* up, const W* down, size_t inner,
         const Argument& out) {
  const size_t tokens = x.size(0), hidden = x.size(1), experts = gates.size(1);
  std::vector<Pair> pairs;
  std::vector<size_t> begins{0};
  for (size_t e = 0; e < experts; ++e) {
    for (size_t t = 0; t < tokens; ++t) {
      const float weight = gates.as<const float>()[t * experts + e];
      if (weight != 0.0f) pairs.push_back({t, weight});
    }
    begins.push_back(pairs.size());
  }
  float* gated = scratch<kHidden>(pairs.size() * inner + kLanes);
  const size_t inner_tiles = (inner + kColumnTile - 1) / kColumnTile;
  parallel_for(experts * inner_tiles, [&](size_t index) {
    const size_t e = index / inner_tiles, first = index % inner_tiles * kColumnTile;
    const size_t columns = std::min(kColumnTile, inner - first), matrix = e * hidden * inner + first;
    for_groups(begins[e], begins[e + 1], [&](size_t pair, int group) {
      const float* rows[kGroup];
      float gate_tile[kGroup * kColumnTile], up_tile[kGroup * kColumnTile];
      for (int t = 0; t < group; ++t) rows[t] = x.as<const float>() + pairs[pair + t].token * hidden;
      multiply_columns(rows, group, gate + matrix, hidden, inner, columns, gate_tile);
      multiply_columns(rows, group, up + matrix, hidden, inner, columns, up_tile);
      for (int t = 0; t < group; ++t) {
        swiglu(gate_tile + t * kColumnTile, up_tile + t * kColumnTile, columns, gated + (pair + t) * inner + first);
      }
    });
  });
  const size_t hidden_tiles = (hidden + kColumnTile - 1) / kColumnTile;
  parallel_for(hidden_tiles, [&](size_t index) {
    const size_t first = index * kColumnTile, columns = std::min(kColumnTile, hidden - first);
    float* result = out.as<float>() + first;
    for (size_t t = 0; t < tokens; ++t) std::fill_n(result + t * hidden, columns, 0.0f);
    for (size_t e = 0; e < experts; ++e) {
      for_groups(begins[e], begins[e + 1], [&](size_t pair, int group) {
        const float* rows[kGroup];
        float tile[kGroup * kColumnTile];
        for (int t = 0; t < group; ++t) rows[t] = gated + (pair + t) * inner;
        multiply_columns(rows, group, down + e * inner * hidden + first, inner, hidden, columns, tile);
        for (int t = 0; t < group; ++t) {
          float* to = result + pairs[pair + t].token * hidden;
          for (size_t n = 0; n < columns; ++n) to[n] += pairs[pair + t].gate * tile[t * kColumnTile + n];
        }
      });
    }
  });
}

}  // namespace

void experts(const Argument& x, const Argument& gates, const Argument& gate, const Argument& up, const Argument& down,
             const Argument& out) {
  const size_t experts = gates.size(1), hidden = x.size(1), inner = gate.size(2);
  expect(gates.size(0) == x.size(0), "gates and x differ in tokens");
  for (const Argument& weight : {gate, up}) {
    expect(weight.size(0) == experts && weight.size(1) == hidden && weight.size(2) == inner,
           "gate or up has the wrong shape");
  }
  expect(down.size(0) == experts && down.size(1) == inner && down.size(2) == hidden, "down has the wrong shape");
  expect(up.dtype == gate.dtype && down.dtype == gate.dtype, "the experts' weights differ in dtype");
  expect(out.size(0) == x.size(0) && out.size(1) == hidden, "output has the wrong shape");
  with_stored(gate, "gate", [&](auto* stored) {
    using W = std::decay_t<decltype(*stored)>;
    mix<W>(x, gates, stored, up.as<const W>(), down.as<const W>(), inner, out);
  });
}

void choose_experts(const Argument& scores, size_t chosen) {
  const size_t experts = scores.size(1);
  expect(chosen <= experts, "more experts are chosen than there are");
  std::vector<size_t> order(experts);
  for (size_t t = 0; t < scores.size(0); ++t) {
    float* row = scores.as<float>() + t * experts;
    const float peak = *std::max_element(row, row + experts);
    float total = 0.0f;
    for (size_t e = 0; e < experts; ++e) total += row[e] = std::exp(row[e] - peak);
    for (size_t e = 0; e < experts; ++e) row[e] /= total;
    for (size_t e = 0; e < experts; ++e) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return row[a] > row[b]; });
    float kept = 0.0f;
    for (size_t i = 0; i < chosen; ++i) kept += row[order[i]];
    for (size_t i = 0; i < experts; ++i) row[order[i]] = i < chosen ? row[order[i]] / (kept + 1e-9f) : 0.0f;
  }
}

void add_expert_biases(const Argument& gates, const Argument& bias, const Argument& residual, const Argument& out) {
  const size_t experts = gates.size(1), hidden = out.size(1);
  expect(bias.size(0) == 1 && bias.size(1) == experts && bias.size(2) == 1 && bias.size(3) == hidden,
         "expert biases have the wrong shape");
  expect(gates.size(0) == out.size(0), "gates and output differ in tokens");
  expect(residual.size(0) == out.size(0) && residual.size(1) == hidden, "residual has the wrong shape");
  with_stored(bias, "expert biases", [&](auto* stored) {
    for (size_t t = 0; t < out.size(0); ++t) {
      float* to = out.as<float>() + t * hidden;
      const float* kept = residual.as<const float>() + t * hidden;
      for (size_t n = 0; n < hidden; ++n) to[n] += kept[n];
      for (size_t e = 0; e < experts; ++e) {
        const float gate = gates.as<const float>()[t * experts + e];
        if (gate == 0.0f) continue;
        for (size_t n = 0; n < hidden; ++n) to[n] += gate * widen(stored[e * hidden + n]);
      }
    }
  });
}

// x [T, h], gates [T, E], gate and up [E, h, F], down [E, F, h] -> [T, h]
TELECHAT_KERNEL(telechat_experts) {
  return guarded("experts", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(6, 6);
    experts(arguments.floats(0, 2, "x"), arguments.floats(1, 2, "gates"), arguments.get(2, 3, "gate"),
            arguments.get(3, 3, "up"), arguments.get(4, 3, "down"), arguments.floats(5, 2, "output"));
  });
}

}  // namespace telechat
