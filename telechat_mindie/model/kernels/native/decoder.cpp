// The whole decoder of one rank in one call, from token ids to logits: between the operators of a graph MindSpore takes
// longer than the smaller of them, and it compiles a graph for every number of tokens.
#include <algorithm>
#include <vector>

#include "layers.h"

namespace telechat {
namespace {

// Arguments one after the other.
class Cursor {
 public:
  explicit Cursor(const Arguments& arguments) : arguments_(arguments) {}

  Argument take(int rank, const char* name) { return arguments_.get(next_++, rank, name); }
  Argument take(int rank, Dtype dtype, const char* name) { return arguments_.get(next_++, rank, dtype, name); }
  int left() const { return arguments_.count() - next_; }

 private:
  const Arguments& arguments_;
  int next_ = 0;
};

// Activations [T, width] in scratch memory.
template <int Use>
struct Rows {
  int64_t shape[2];
  float* data;

  Rows(size_t tokens, size_t width) : shape{int64_t(tokens), int64_t(width)}, data(scratch<Use>(tokens * width)) {}

  Argument argument() const { return Argument{data, 2, shape, Dtype::kFloat}; }

  // Only the `chosen` rows, in their order; `spare` is at least as large.
  void keep(const Argument& chosen, float* spare) {
    const size_t count = chosen.size(0), width = size_t(shape[1]);
    for (size_t r = 0; r < count; ++r) {
      std::copy_n(data + size_t(chosen.as<const int32_t>()[r]) * width, width, spare + r * width);
    }
    std::copy_n(spare, count * width, data);
    shape[0] = int64_t(count);
  }
};

struct Feed {
  Argument norm, gate_up, down, down_bias;
};

struct Mixture {
  Argument norm, router, gate, up, down, down_bias;
};

struct Layer {
  Argument attention_norm, qkv, output, output_bias;
  Feed feed;
  Mixture mixture;
  Argument keys, values;
};

struct Model {
  float eps;
  Argument block_size, embedding, embedding_norm;
  bool embedding_is_normalised;
  size_t chosen_experts;  // 0: dense
  std::vector<Layer> layers;
  Argument norm, head;
};

Layer read_layer(Cursor& cursor, bool dense) {
  Layer layer{};
  layer.attention_norm = cursor.take(1, "attention norm");
  layer.qkv = cursor.take(2, "qkv");
  layer.output = cursor.take(2, "output projection");
  layer.output_bias = cursor.take(1, "output bias");
  if (dense) {
    layer.feed = {cursor.take(1, "feed-forward norm"), cursor.take(2, "gate and up"), cursor.take(2, "down"),
                  cursor.take(1, "down bias")};
  } else {
    layer.mixture = {cursor.take(1, "feed-forward norm"), cursor.take(2, "router"), cursor.take(3, "gate"),
                     cursor.take(3, "up"), cursor.take(3, "down"), cursor.take(4, "down bias")};
  }
  layer.keys = cursor.take(2, "key cache");
  layer.values = cursor.take(2, layer.keys.dtype, "value cache");
  return layer;
}

Model read_model(Cursor& cursor) {
  Model model{};
  const Argument form = cursor.take(1, Dtype::kInt, "form");
  expect(form.size(0) == 3, "form is not three numbers");
  const int32_t* numbers = form.as<const int32_t>();
  expect(numbers[0] > 0 && numbers[1] >= 0, "form has a negative number");
  model.chosen_experts = size_t(numbers[1]);
  model.embedding_is_normalised = numbers[2] != 0;
  model.eps = epsilon(cursor.take(1, Dtype::kFloat, "eps"));
  model.block_size = cursor.take(1, Dtype::kInt, "block size");
  model.embedding = cursor.take(2, "embedding");
  if (model.embedding_is_normalised) model.embedding_norm = cursor.take(1, "embedding norm");
  for (int32_t i = 0; i < numbers[0]; ++i) model.layers.push_back(read_layer(cursor, model.chosen_experts == 0));
  model.norm = cursor.take(1, "norm");
  model.head = cursor.take(2, "head");
  return model;
}

// Whether `rows` [R] are all of T tokens in their order.
bool are_all(const Argument& rows, size_t tokens) {
  const int32_t* chosen = rows.as<const int32_t>();
  expect(rows.size(0) <= tokens, "more rows than tokens are wanted");
  bool all = rows.size(0) == tokens;
  for (size_t r = 0; r < rows.size(0); ++r) {
    if (chosen[r] < 0 || size_t(chosen[r]) >= tokens) {
      throw Fault{"row " + std::to_string(chosen[r]) + " lies outside the call"};
    }
    all = all && size_t(chosen[r]) == r;
  }
  return all;
}

// x = the feed-forward of `mid`, and `mid` itself.
void feed_forward(const Feed& feed, float eps, const Argument& mid, const Argument& x) {
  const Rows<kGated> gated(mid.size(0), feed.gate_up.size(0) / 2);
  norm_swiglu(mid, feed.norm, feed.gate_up, eps, gated.argument());
  linear_add(gated.argument(), feed.down, feed.down_bias, mid, x);
}

void feed_forward(const Mixture& mixture, size_t chosen, float eps, const Argument& mid, const Argument& x) {
  const size_t tokens = mid.size(0);
  const Rows<kNormed> normed(tokens, mid.size(1));
  const Rows<kScores> scores(tokens, mixture.router.size(0));
  norm(mid, mixture.norm, eps, normed.argument());
  linear(normed.argument(), mixture.router, scores.argument());
  choose_experts(scores.argument(), chosen);
  experts(normed.argument(), scores.argument(), mixture.gate, mixture.up, mixture.down, x);
  add_expert_biases(scores.argument(), mixture.down_bias, mid, x);
}

void run(const Model& model, const Argument& ids, const Argument& rows, const Context& context, const Argument& out) {
  const size_t tokens = ids.size(0), hidden = model.embedding.size(1);
  const bool all = are_all(rows, tokens);
  Rows<kResidual> x(tokens, hidden);
  Rows<kSecondResidual> mid(tokens, hidden);
  if (model.embedding_is_normalised) {
    embed(model.embedding, ids, mid.argument());
    norm(mid.argument(), model.embedding_norm, model.eps, x.argument());
  } else {
    embed(model.embedding, ids, x.argument());
  }
  for (const Layer& layer : model.layers) {
    const Rows<kPacked> qkv(tokens, layer.qkv.size(0));
    Rows<kAttended> attended(tokens, layer.output.size(1));
    norm_linear(x.argument(), layer.attention_norm, layer.qkv, model.eps, qkv.argument());
    attention(qkv.argument(), layer.keys, layer.values, context, attended.argument());
    if (&layer == &model.layers.back() && !all) {  // from here on nothing looks at the other tokens
      attended.keep(rows, qkv.data);
      x.keep(rows, mid.data);
      mid.shape[0] = x.shape[0];
    }
    linear_add(attended.argument(), layer.output, layer.output_bias, x.argument(), mid.argument());
    if (model.chosen_experts == 0) {
      feed_forward(layer.feed, model.eps, mid.argument(), x.argument());
    } else {
      feed_forward(layer.mixture, model.chosen_experts, model.eps, mid.argument(), x.argument());
    }
  }
  norm_linear(x.argument(), model.norm, model.head, model.eps, out);
}

}  // namespace

// form [3] (layers, experts of a token or 0, whether the embedding is normalised), eps [1], block size [1],
// embedding [V, h], perhaps its norm [h]; each layer's weights and caches, see read_layer; norm [h], head [V, h];
// ids [T], rows [R] of T whose logits are wanted, rotary, slots, sequences and perhaps mask, see Context -> [R, V]
TELECHAT_KERNEL(telechat_decoder) {
  return guarded("decoder", [&] {
    const Arguments arguments(count, data, ranks, shapes, dtypes);
    Cursor cursor(arguments);
    const Model model = read_model(cursor);
    const Argument ids = cursor.take(1, Dtype::kInt, "ids"), rows = cursor.take(1, Dtype::kInt, "rows");
    Context context{cursor.take(2, Dtype::kFloat, "rotary"), cursor.take(1, Dtype::kInt, "slots"),
                    cursor.take(2, Dtype::kInt, "sequences"), model.block_size, nullptr};
    Argument mask{};
    if (cursor.left() == 2) {
      mask = cursor.take(2, Dtype::kBool, "mask");
      context.mask = &mask;
    }
    const Argument out = cursor.take(2, Dtype::kFloat, "output");
    expect(cursor.left() == 0, "there are more arguments than the form says");
    run(model, ids, rows, context, out);
  });
}

}  // namespace telechat
