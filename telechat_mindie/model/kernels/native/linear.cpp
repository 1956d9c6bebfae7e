// Linear layers with what comes before and after them: [T, K] float32 activations, weights [N, K] as they are stored.
#include "layers.h"
#include "matmul.h"

namespace telechat {
namespace {

void check_product(const Argument& x, const Argument& weight, const Argument& out, size_t columns) {
  expect(x.size(1) == weight.size(1), "activations and weight differ in depth");
  expect(out.size(0) == x.size(0) && out.size(1) == columns, "output has the wrong shape");
}

// Calls body(activations, weight pointer) with x arranged for the weight; norm may be null.
template <class Body>
void with_arranged(const Argument& x, const Argument* norm, float eps, const Argument& weight, Body&& body) {
  with_stored(weight, "weight", [&](auto* stored) {
    using W = std::decay_t<decltype(*stored)>;
    const float* rows = x.as<const float>();
    if (norm == nullptr) {
      body(arrange<W, float>(rows, x.size(0), x.size(1), nullptr, 0.0f), stored);
    } else {
      expect(norm->size(0) == x.size(1), "norm weight has the wrong length");
      with_stored(*norm, "norm weight",
                  [&](auto* scale) { body(arrange<W>(rows, x.size(0), x.size(1), scale, eps), stored); });
    }
  });
}

void product(const Argument& x, const Argument* norm, float eps, const Argument& weight, const Argument& out) {
  const size_t rows = weight.size(0);
  check_product(x, weight, out, rows);
  with_arranged(x, norm, eps, weight, [&](const Activations& arranged, auto* stored) {
    for_row_chunks(rows, [&](size_t first, size_t count) {
      multiply(arranged, stored + first * arranged.depth, count, out.as<float>() + first, rows);
    });
  });
}

}  // namespace

float epsilon(const Argument& argument) {
  expect(argument.size(0) == 1, "eps is not one number");
  return *argument.as<const float>();
}

void linear(const Argument& x, const Argument& weight, const Argument& out) { product(x, nullptr, 0.0f, weight, out); }

void norm_linear(const Argument& x, const Argument& norm, const Argument& weight, float eps, const Argument& out) {
  product(x, &norm, eps, weight, out);
}

void linear_add(const Argument& x, const Argument& weight, const Argument& bias, const Argument& residual,
                const Argument& out) {
  const size_t rows = weight.size(0);
  check_product(x, weight, out, rows);
  expect(bias.size(0) == rows, "bias has the wrong length");
  expect(residual.size(0) == x.size(0) && residual.size(1) == rows, "residual has the wrong shape");
  with_stored(bias, "bias", [&](auto* added) {
    with_arranged(x, nullptr, 0.0f, weight, [&](const Activations& arranged, auto* stored) {
      for_row_chunks(rows, [&](size_t first, size_t some) {
        multiply(arranged, stored + first * arranged.depth, some, out.as<float>() + first, rows);
        for (size_t t = 0; t < arranged.tokens; ++t) {
          const float* kept = residual.as<const float>() + t * rows + first;
          float* to = out.as<float>() + t * rows + first;
          for (size_t n = 0; n < some; ++n) to[n] += widen(added[first + n]) + kept[n];
        }
      });
    });
  });
}

void norm_swiglu(const Argument& x, const Argument& norm, const Argument& weight, float eps, const Argument& out) {
  expect(weight.size(0) % 2 == 0, "gate and up differ in size");
  const size_t rows = weight.size(0) / 2;
  check_product(x, weight, out, rows);
  with_arranged(x, &norm, eps, weight, [&](const Activations& arranged, auto* stored) {
    for_row_chunks(rows, [&](size_t first, size_t some) {
      const size_t stride = round_up(some, kLanes);
      float* gate = scratch<kChunk>(arranged.tokens * stride);
      float* up = scratch<kChunkSecond>(arranged.tokens * stride);
      multiply(arranged, stored + first * arranged.depth, some, gate, stride);
      multiply(arranged, stored + (rows + first) * arranged.depth, some, up, stride);
      for (size_t t = 0; t < arranged.tokens; ++t) {
        swiglu(gate + t * stride, up + t * stride, some, out.as<float>() + t * rows + first);
      }
    });
  });
}

void norm(const Argument& x, const Argument& weight, float eps, const Argument& out) {
  const size_t depth = x.size(1);
  expect(weight.size(0) == depth, "weight has the wrong length");
  expect(out.size(0) == x.size(0) && out.size(1) == depth, "output has the wrong shape");
  with_stored(weight, "weight", [&](auto* stored) {
    parallel_for((x.size(0) + 7) / 8, [&](size_t index) {
      for (size_t t = index * 8; t < std::min(index * 8 + 8, x.size(0)); ++t) {
        const float* from = x.as<const float>() + t * depth;
        const float scale = inverse_rms(from, depth, eps);
        for (size_t k = 0; k < depth; ++k) out.as<float>()[t * depth + k] = from[k] * scale * widen(stored[k]);
      }
    });
  });
}

void embed(const Argument& weight, const Argument& ids, const Argument& out) {
  const size_t depth = weight.size(1);
  expect(out.size(0) == ids.size(0) && out.size(1) == depth, "output has the wrong shape");
  with_stored(weight, "weight", [&](auto* stored) {
    for (size_t t = 0; t < ids.size(0); ++t) {
      const int32_t id = ids.as<const int32_t>()[t];
      if (id < 0 || size_t(id) >= weight.size(0)) throw Fault{"token id " + std::to_string(id) + " is out of range"};
      for (size_t k = 0; k < depth; ++k) out.as<float>()[t * depth + k] = widen(stored[size_t(id) * depth + k]);
    }
  });
}

// x [T, K], weight [N, K] -> [T, N]
TELECHAT_KERNEL(telechat_linear) {
  return guarded("linear", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(3, 3);
    linear(arguments.floats(0, 2, "x"), arguments.get(1, 2, "weight"), arguments.floats(2, 2, "output"));
  });
}

// x [T, K], norm weight [K], weight [N, K], eps [1] -> [T, N]
TELECHAT_KERNEL(telechat_norm_linear) {
  return guarded("norm_linear", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(5, 5);
    norm_linear(arguments.floats(0, 2, "x"), arguments.get(1, 1, "norm weight"), arguments.get(2, 2, "weight"),
                epsilon(arguments.floats(3, 1, "eps")), arguments.floats(4, 2, "output"));
  });
}

// x [T, K], weight [N, K], bias [N], residual [T, N] -> [T, N]
TELECHAT_KERNEL(telechat_linear_add) {
  return guarded("linear_add", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(5, 5);
    linear_add(arguments.floats(0, 2, "x"), arguments.get(1, 2, "weight"), arguments.get(2, 1, "bias"),
               arguments.floats(3, 2, "residual"), arguments.floats(4, 2, "output"));
  });
}

// x [T, K], norm weight [K], weight [2 F, K], eps [1] -> silu(gate) * up [T, F]
TELECHAT_KERNEL(telechat_norm_swiglu) {
  return guarded("norm_swiglu", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(5, 5);
    norm_swiglu(arguments.floats(0, 2, "x"), arguments.get(1, 1, "norm weight"), arguments.get(2, 2, "weight"),
                epsilon(arguments.floats(3, 1, "eps")), arguments.floats(4, 2, "output"));
  });
}

// x [T, K], weight [K], eps [1] -> [T, K]
TELECHAT_KERNEL(telechat_norm) {
  return guarded("norm", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(4, 4);
    norm(arguments.floats(0, 2, "x"), arguments.get(1, 1, "weight"), epsilon(arguments.floats(2, 1, "eps")),
         arguments.floats(3, 2, "output"));
  });
}

// weight [V, K], ids [T] -> rows of the weight in float32 [T, K]
TELECHAT_KERNEL(telechat_embed) {
  return guarded("embed", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    arguments.expect_count(3, 3);
    embed(arguments.get(0, 2, "weight"), arguments.get(1, 1, Dtype::kInt, "ids"), arguments.floats(2, 2, "output"));
  });
}

}  // namespace telechat
