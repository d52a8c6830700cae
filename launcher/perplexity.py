"""What a loss says in words: among how many equally likely tokens the model had to guess."""

import math

_LARGEST_EXPONENT = 700.0


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats a token; of one that is out of all range the greatest that can be written."""
    return math.exp(min(loss, _LARGEST_EXPONENT))
