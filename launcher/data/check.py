"""All that can be known of the data before anything is started; imports no JAX."""

from cluster.errors import ConfigError
from launcher.config import TrainingConfig
from launcher.data.cache import ranks_of, split_limit
from launcher.data.documents import START_OF_TURN
from launcher.data.pack import control_id
from launcher.data.sources import read_documents
from launcher.data.tokenizer import Tokenizer


def check_data(config: TrainingConfig, tokenizer: Tokenizer) -> int:
    """Read every record of every source; how many documents there are.

    Raises ConfigError, one line: a source that cannot be used, with file, line and field; too little to hold some out; a tokenizer that
    is none, knows more tokens than the model, or has none for the turns of conversations.
    """
    data = config.data
    if tokenizer.vocab > config.model.shape.vocab:
        raise ConfigError(
            f"data.tokenizer {data.tokenizer or config.model.weights} has {tokenizer.vocab} tokens and {config.model.variant} "
            f"only {config.model.shape.vocab}; "
            "choose the model's own tokenizer, or another model.variant"
        )
    ranks = ranks_of(data)
    split_limit(data, ranks)
    for where, source, _ in data.sources():
        for piece in next(iter(read_documents(source, where))).pieces:
            if piece.control:
                control_id(tokenizer, piece.text.decode())
    samples = config.trainer.samples
    if samples.chat and samples.prompts:
        control_id(tokenizer, START_OF_TURN)
    return sum(map(len, ranks))
