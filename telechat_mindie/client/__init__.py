"""A client of MindIE's HTTP API, for the terminal chat and the load test; it speaks to the address it is given only."""
