"""MindIE's HTTP API over the embedded engine.

In the comments of this package a bare `file.cpp` is under src/server/endpoint of the public MindIE-LLM repository at
v3.0.0.beta.2. `docs/http-api.md` says where this server answers differently, and why.
"""
