"""The forms in which vLLM, transformers, atb and llama.cpp take a TeleChat2: what stands there beside the weights.

- `layout` renders the files of a directory: config.json, generation_config.json, the tokenizer's.
- `tokenizer_json` makes tokenizer.json, the form of tokenizer.model that all of them read alike.
- `limits` says what of a model one of them does not compute.
- `hugging_face/` is no part of this package: it is the code that transformers and vLLM load with trust_remote_code,
  copied into every directory of that form.
"""
