"""TeleChat2's configuration for transformers and vLLM, written by telechat-mindie (Apache-2.0)."""

from transformers import PretrainedConfig


class TeleChat2Config(PretrainedConfig):
    """Sizes of a TeleChat2 model, under the names of its published config.json.

    Args:
        num_key_value_heads: heads of keys and values; as many as of queries where None.
        ffn_hidden_size: width of the feed-forward, of each expert in a mixture of experts.
        num_local_experts: 0 for a dense model.
        seq_length: tokens that the model is offered with, by Dynamic NTK beyond `base_seqlen`.
        training_seqlen, base_seqlen: tokens that Dynamic NTK goes by; `seq_length` where None.
        max_position_embeddings: tokens up to which the rotary embedding is the plain one. vLLM knows no other, and
            takes this for the longest sequence. It follows from the others, so it is not saved.
    """

    model_type = "telechat"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "rms_norm_eps": "layer_norm_epsilon",
    }

    def __init__(
        self,
        vocab_size=131072,
        hidden_size=4096,
        n_layer=30,
        n_head=32,
        num_key_value_heads=None,
        ffn_hidden_size=12288,
        layer_norm_epsilon=1e-5,
        seq_length=8192,
        training_seqlen=None,
        base_seqlen=None,
        max_position_embeddings=None,
        rope_theta=10000.0,
        num_local_experts=0,
        num_experts_per_tok=0,
        embed_layernorm=False,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        **others,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.n_layer = n_layer
        self.n_head = n_head
        self.num_key_value_heads = num_key_value_heads or n_head
        self.ffn_hidden_size = ffn_hidden_size
        self.layer_norm_epsilon = layer_norm_epsilon
        self.seq_length = seq_length
        self.training_seqlen = training_seqlen or seq_length
        self.base_seqlen = base_seqlen or self.training_seqlen
        self.max_position_embeddings = max_position_embeddings or min(
            seq_length, self.training_seqlen, self.base_seqlen
        )
        self.rope_theta = rope_theta
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.embed_layernorm = embed_layernorm
        self.hidden_act = "silu"
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **others,
        )

    def to_dict(self):
        return {key: value for key, value in super().to_dict().items() if key != "max_position_embeddings"}
