"""The directory that MindIE >= 3.0 loads by its own backend, `backendType: "atb"`: layout, rules, build.

It is a Hugging Face checkpoint in float16, or what msmodelslim made of one. What is said of atb_llm here was read in,
and up to the loading of weights run with, MindIE-LLM v3.0.0 examples/atb_models/atb_llm; nobody has seen it on an NPU.
"""
