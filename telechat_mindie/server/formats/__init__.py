"""The request formats that MindIE's HTTP API speaks, one module each."""
