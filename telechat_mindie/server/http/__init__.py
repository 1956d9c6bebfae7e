"""HTTP below the formats: bytes, bounds, errors, TLS."""
