"""TeleChat2 for transformers, in plain torch, written by telechat-mindie (Apache-2.0).

A decoder like Llama's but for three things: keys and values of a head lie beside each other in one weight, the output
projections have biases, and the rotary embedding stretches beyond the trained length (`rotary_tables`).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_telechat2 import TeleChat2Config


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layer_norm_epsilon

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(config, positions, lengths):
    """Cosines and sines [batch, 1, tokens, head_dim], float32, with Dynamic NTK.

    Args:
        positions: [batch, tokens], of each token in its sequence.
        lengths: [batch], tokens of each sequence so far, the new ones included.
    """
    dim = config.hidden_size // config.n_head
    length = lengths.double().clamp(min=config.training_seqlen)
    alpha = (2 ** torch.ceil(torch.log2(length / config.base_seqlen) + 1) - 1).clamp(min=1)
    scale = 0.1 * torch.log(length / config.training_seqlen) + 1  # 1 up to the trained length
    theta = (config.rope_theta * alpha ** (dim / (dim - 2))).float()[:, None]
    exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
    angles = positions[:, :, None].float() / (theta**exponents)[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = scale.float()[:, None, None, None]
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """`x` [batch, heads, tokens, head_dim] turned by its positions; a head's halves are the two coordinates."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.hidden_size // config.n_head
        self.groups = config.n_head // config.num_key_value_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.num_key_value_heads * self.head_dim, bias=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, tables, mask, cache):
        batch, tokens, hidden = x.shape
        query = self.query(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        # [batch, tokens, kv heads, key | value, head_dim]
        key, value = self.key_value(x).view(batch, tokens, -1, 2, self.head_dim).transpose(1, 2).unbind(3)
        query, key = rotate(query, *tables), rotate(key, *tables)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        key, value = (part.repeat_interleave(self.groups, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.dense(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """The experts that the router gives most to, weighted by their share of it (float32)."""

    def __init__(self, config):
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.local_experts = nn.ModuleList(MLP(config) for _ in range(config.num_local_experts))

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)
        shares, experts = probabilities.topk(self.chosen)
        shares = (shares / (shares.sum(-1, keepdim=True) + 1e-9)).to(x.dtype)
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.local_experts):
            rows, place = torch.where(experts == index)
            mixed.index_add_(0, rows, shares[rows, place, None] * expert(tokens[rows]))
        return mixed.view_as(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attention = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MoE(config) if config.num_local_experts else MLP(config)

    def forward(self, x, tables, mask, cache):
        x = x + self.self_attention(self.input_layernorm(x), tables, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embed_layernorm:
            self.word_embeddings_layernorm = RMSNorm(config)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config)

    def forward(self, x, attention_mask, positions, cache):
        """Hidden states [batch, tokens, hidden] of embeddings.

        Args:
            attention_mask: [batch, past + tokens], 0 where there is padding; None where there is none.
            positions: [batch, tokens]; None to count what is no padding.
        """
        batch, tokens, _ = x.shape
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens, dtype=torch.long, device=x.device)
        counted = attention_mask.long().cumsum(-1)
        if positions is None:
            positions = (counted - 1).clamp(min=0)[:, past:]
        tables = rotary_tables(self.config, positions.expand(batch, tokens), counted[:, -1])
        row = torch.arange(past, past + tokens, device=x.device)[:, None]
        column = torch.arange(past + tokens, device=x.device)
        # A token of padding sees itself, for a row without a single column would be no softmax.
        mask = (column <= row) & attention_mask.bool()[:, None, None, :] | (column == row)
        if self.config.embed_layernorm:
            x = self.word_embeddings_layernorm(x)
        for block in self.h:
            x = block(x, tables, mask, cache)
        return self.ln_f(x)


class TeleChat2ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TeleChat2Config
    base_model_prefix = "transformer"
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # a table since transformers 5
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.word_embeddings

    def set_input_embeddings(self, embeddings):
        self.transformer.word_embeddings = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **others,
    ):
        """Logits [batch, tokens, vocabulary], or of the last `logits_to_keep` tokens, as any causal model's."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.transformer(x, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            wanted = labels[:, 1:].reshape(-1).to(logits.device)  # -100 does not count
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), wanted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
