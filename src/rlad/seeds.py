"""Seeds of independent random streams.

A stream is named by its purpose and its step, so no random state has to be stored to resume a run.
"""

import hashlib


def stream_seed(seed: int, *names: object) -> int:
    """Return a 63-bit seed for the stream called `names` of a run with this seed."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
