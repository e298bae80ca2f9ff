"""transformers' ``generate`` without the habits that a model's own generation config brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from lorakit.infer.generation.rows import is_encoder_decoder

#: tokens by which a text begins and ends
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
#: what the decoder of an encoder-decoder cannot do without: mBART's answers begin with their
#: language, the padding with which Marian's begin has a logit that nothing was learnt for and must
#: not be chosen, and Whisper has tokens for what is not speech
_KEPT_OF_DECODERS = (
    "forced_bos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@contextlib.contextmanager
def plain_generation(model: Any, **settings: Any) -> Iterator[None]:
    """``model.generate`` by these settings until the block ends.

    Of the model's own generation config only the tokens act by which a text begins and ends, and
    of an encoder-decoder's what its answer begins with and may never hold; no beams, penalties or
    least lengths. The config is exchanged, for one that is given to ``generate`` is filled up
    with the model's.
    """
    own = model.generation_config
    kept = _KEPT + (_KEPT_OF_DECODERS if is_encoder_decoder(model) else ())
    values = {name: getattr(own, name, None) for name in kept}
    model.generation_config = GenerationConfig(**{**values, **settings})  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own
