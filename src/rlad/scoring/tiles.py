"""How many logits exist at once, and for how many tokens a cache has room. Imports no torch."""

from math import isqrt

# On a GPU, reading the whole weight matrix for each chunk takes less time than starting the
# kernels, so chunks are larger there.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}
MIN_CHUNK_TOKENS = 16


def tokens_per_chunk(device_type: str, vocabulary: int) -> int:
    """Return how many tokens' logits, `[token, vocabulary]`, are held at once on a device of this
    type."""
    logits = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
    return max(MIN_CHUNK_TOKENS, logits // vocabulary)


# On a CPU a tile stays in the cache of its cores.
LOGITS_PER_TILE = {"cpu": 2**19, "cuda": 2**26}


def tile_shape(device_type: str, num_tokens: int, vocabulary: int) -> tuple[int, int]:
    """Return the tokens and the vocabulary entries of a tile of logits.

    The tile is nearly square, which reads hidden states and weights least often. It covers all
    tokens, or the whole vocabulary, if there are few.
    """
    # Of all tiles of this size a square has the shortest edges, and the edges are what is read:
    # rows of hidden states and rows of weights.
    logits = LOGITS_PER_TILE.get(device_type, LOGITS_PER_TILE["cuda"])
    entries = min(vocabulary, max(isqrt(logits), logits // max(num_tokens, 1)))
    return max(1, min(num_tokens, logits // entries)), entries
