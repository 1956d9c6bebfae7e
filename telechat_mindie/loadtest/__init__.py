"""A load test of a service: what is sent, how, and what is made of the answers."""
