"""Names of tensors, as files may have them."""

from __future__ import annotations

#: characters of a name; modules are nested some tens of levels deep at most
MAX_LENGTH = 1000


def odd_name(name: str) -> str | None:
    """Why no tensor is called so; ``None`` if one may be.

    Letters of any script are names. Control characters, which steer a terminal, invisible ones,
    and halves of a UTF-16 pair, which no file can be written with, are not.
    """
    if not name:
        return "an empty name"
    if len(name) > MAX_LENGTH:
        return f"a name of {len(name)} characters; at most {MAX_LENGTH} are read"
    if not name.isprintable():
        return "a name with characters that cannot be printed"
    return None
