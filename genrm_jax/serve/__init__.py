"""A reward server: `genrm-jax serve`. Many clients, several protocols, one engine.

command   flags
server    start and stop, addresses and tokens
app       HTTP: limits, tokens, deadlines, status codes, metrics
dialects  the protocols: JSON bodies to texts to score, and scores to replies
scorer    the queue and the thread that owns JAX
batches   continuous batching of rationales; batches of what waits for other verifiers
"""
