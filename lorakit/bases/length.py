"""How many tokens a model can take."""

from __future__ import annotations

from typing import Any

#: names under which the configs of transformers keep it
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
#: their position numbers begin after the padding id, so that many positions cannot be used
_OFFSET_BY_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer")


def most_positions(model: Any) -> int | None:
    """Positions that the encoder and the decoder of ``model`` have, each; ``None`` where they are
    relative, as T5's."""
    found: int | None = getattr(model.config, "max_position_embeddings", None)
    return found


def context_length(model: Any) -> int | None:
    """The longest sequence in tokens that ``model`` was made for.

    Args:
        model: a transformers model, or its config.

    Returns:
        ``None`` for a model without a limit (relative positions, state spaces) or a config.
    """
    config = getattr(model, "config", model)
    parts = [config]
    if hasattr(config, "get_text_config"):
        parts.insert(0, config.get_text_config())
    for part in parts:
        for name in _NAMES:
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                if getattr(part, "model_type", None) in _OFFSET_BY_PADDING:
                    return value - 1 - (getattr(part, "pad_token_id", None) or 0)
                return value
    return None
