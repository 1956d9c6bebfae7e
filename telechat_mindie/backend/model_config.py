"""What MindIE reads of a model beside the runner itself."""

from __future__ import annotations

from telechat_mindie.model_dir.layout import ModelDir


class ModelConfig:
    """What MindIE reads of a model, as plain attributes: it takes `__dict__`, and overwrites keys it has as well.

    `max_position_embedding` (singular, as MindIE spells it) is the directory's longest sequence in tokens. `top_k` is
    also the k of MindIE's warm-up sampling, which fails where it exceeds the vocabulary; 0 is no limit there too.
    """

    def __init__(self, directory: ModelDir) -> None:
        config, serving = directory.config, directory.serving
        self.max_position_embedding = serving.max_seq_len
        self.seq_length = serving.max_seq_len
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads
        self.bos_token_id = config.bos_token_id
        eos = config.eos_token_id  # MindIE takes an int or a list (text_generator/utils/config.py, set_eos_token_id)
        self.eos_token_id = list(eos) if isinstance(eos, tuple) else eos
        self.pad_token_id = config.pad_token_id
        self.do_sample = serving.do_sample
        self.temperature = serving.temperature
        self.top_k = min(serving.top_k, config.vocab_size)
        self.top_p = serving.top_p
        self.repetition_penalty = serving.repetition_penalty
