"""Which of many things are so, one bit each, as text that fits into a record: 5,000 images take 834 characters."""

import base64

import numpy as np


def packed(bits: np.ndarray) -> str:
    """Base64 of eight bits to a byte, the first one highest.

    Args:
        bits: (n,) bool.
    """
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """What `packed` was given.

    Args:
        text: its result.
        count: n.

    Returns:
        (n,) bool.

    Raises:
        ValueError: if the text holds another number of bytes.
    """
    content = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if len(content) != (count + 7) // 8:
        raise ValueError(f"{len(content)} bytes hold no {count} bits, one for each image")
    return np.unpackbits(content, count=count).astype(bool)
