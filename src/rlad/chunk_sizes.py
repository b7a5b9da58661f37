"""For how many tokens logits exist at once, and for how many a cache has room. Imports no torch."""

# A GPU reads the whole weight matrix for each chunk in less time than it takes to start the kernels: larger chunks there.
LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**26}
MIN_CHUNK_TOKENS = 16


def tokens_per_chunk(device_type: str, vocabulary: int) -> int:
    """Tokens whose logits, `[token, vocabulary]`, are held at once on a device of this type."""
    logits = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cuda"])
    return max(MIN_CHUNK_TOKENS, logits // vocabulary)


def room_for(num_tokens: int) -> int:
    """Tokens that the buffers of a growing cache are made for when so many are to be held."""
    return num_tokens + max(64, num_tokens // 4)
