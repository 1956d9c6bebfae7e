// What the operators compute, on checked or made-up arguments: activations are float32 [T, K], weights [N, K] in their
// stored dtype. Each function checks the shapes that it is given, and throws a Fault where they do not fit.
#pragma once

#include "arguments.h"

namespace telechat {

// out [T, K]: rows of `weight` [V, K]
void embed(const Argument& weight, const Argument& ids, const Argument& out);

// out [T, K]
void norm(const Argument& x, const Argument& weight, float eps, const Argument& out);

// out [T, N]
void linear(const Argument& x, const Argument& weight, const Argument& out);

// out [T, N], of x normalised by RMS
void norm_linear(const Argument& x, const Argument& norm, const Argument& weight, float eps, const Argument& out);

// out [T, N]: the product, `bias` [N] and `residual` [T, N]
void linear_add(const Argument& x, const Argument& weight, const Argument& bias, const Argument& residual,
                const Argument& out);

// out [T, F]: silu(gate) * up, for `weight` [2 F, K] (gate, then up)
void norm_swiglu(const Argument& x, const Argument& norm, const Argument& weight, float eps, const Argument& out);

// What attention needs besides the layer's own arguments.
struct Context {
  Argument rotary;     // [T, D] cosines, sines
  Argument slots;      // [T], -1: do not write
  Argument sequences;  // [B, 3 + W]: first token, new tokens, context, blocks
  Argument block_size;
  const Argument* mask;  // [T, C] bool, or null: causal
};

// out [T, heads * D], zero for tokens of no sequence; `keys` and `values` [rows, kv heads * D] are written in place
void attention(const Argument& qkv, const Argument& keys, const Argument& values, const Context& context,
               const Argument& out);

// out [T, h]: the sum of the experts' outputs for x [T, h], weighted by `gates` [T, E] (zero: not chosen); `gate` and
// `up` [E, h, F], `down` [E, F, h]
void experts(const Argument& x, const Argument& gates, const Argument& gate, const Argument& up, const Argument& down,
             const Argument& out);

// Turns a router's `scores` [T, E] into gates: softmax over all experts, the `chosen` largest renormalised, others zero.
void choose_experts(const Argument& scores, size_t chosen);

// out [T, h] += residual [T, h] + gates [T, E] @ bias [1, E, 1, h]
void add_expert_biases(const Argument& gates, const Argument& bias, const Argument& residual, const Argument& out);

// The one number in `argument` [1].
float epsilon(const Argument& argument);

}  // namespace telechat
