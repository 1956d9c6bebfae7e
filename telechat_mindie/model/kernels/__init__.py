"""What a decoder layer computes with: one small interface, an implementation for each device.

An implementation is a Cell with these methods; T is the tokens of a call, weights are [out, in]:

    embed(token_ids [T], weight [V, h]) -> [T, h]
    norm(x [T, h], weight [h]) -> [T, h]                              RMSNorm
    norm_linear(x, norm_weight, weight) -> [T, out]                   RMSNorm, then a linear layer
    norm_swiglu(x, norm_weight, weight [2f, h]) -> [T, f]             RMSNorm, one linear, silu(gate) * up
    linear(x, weight) -> [T, out]
    linear_add(x, weight, bias, residual) -> [T, out]                 linear + bias + residual
    attention(qkv [T, (heads + 2 kv heads) * head_dim], key_cache, value_cache, inputs) -> [T, heads * head_dim]
                                                                      rotary, cache write, attention over the context
    experts(x, gates [T, E], gate, up, down) -> [T, h]                the experts' weighted sum, without down's bias
    experts(x, router [E, h], gate, up, down, bias) -> [T, h]         where `routes_experts`: the routing too

and of plain Python, outside the graph:

    calls(batch) -> list[Call]       a RaggedBatch as the static inputs of one or more runs of the decoder
    weight_dtype(stored) -> dtype    the dtype that weights are held in
    cache_dtype(stored) -> dtype     the dtype of the key/value cache
    whole(decoder)                   on the CPU, what computes a decoder of one rank without a graph, or None
"""
