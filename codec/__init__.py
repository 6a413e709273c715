"""Real bitstreams: tables, order of symbols, entropy coding, the container, encoding and decoding."""
