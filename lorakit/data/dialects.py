"""How others write messages: as lists, as JSON in a column of text, with other names for roles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

#: the ``from`` of ShareGPT's ``conversations``, and OpenAI's older names → role
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}

#: who speaks → what is said, as OpenAI and ShareGPT call them
_KEYS = {"role": "content", "from": "value"}

_NAMES = {*ROLES, *OTHER_ROLES}
_BEGINS = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_SAYS_WHO = re.compile(rf"""['"](?:role|from)['"]\s*:\s*['"](?:{"|".join(sorted(_NAMES))})['"]""")
#: the first object of a list as Python prints it, if nothing in it has braces
_FIRST = re.compile(r"\s*\[\s*\{([^{}]*)\}")
_WHO = re.compile(r"""['"](role|from)['"]\s*:\s*['"]([^'"]*)['"]""")


def decoded(value: Any) -> Any:
    """What a column holds: of text that is JSON of a list that list, else the value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def role_of(message: Mapping[str, Any]) -> Any:
    """Whose a message is, by our names; any other as it is, and ``None`` where it is not said."""
    role = message.get("role", message.get("from"))
    return OTHER_ROLES.get(role, role) if isinstance(role, str) else role


def holds_messages(value: Any) -> bool:
    """Whether this is a list of messages, or JSON of one in which each says a known role."""
    found = decoded(value)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        return False
    if isinstance(value, str):
        return bool(found) and all(role_of(one) in ROLES for one in found)
    return bool(found) and any(role_of(one) is not None for one in found)


def looks_like_messages(text: str) -> bool:
    """Whether a text begins as messages of known roles do, in JSON or as Python prints them, whole
    or cut."""
    return bool(_BEGINS.match(text) and _SAYS_WHO.search(text))


def roles_in(text: str) -> list[str]:
    """Who speaks in a text that is a list of messages, in JSON or as Python prints it; any name is
    a role, so what is said must stand there too. Empty for other texts."""
    found = decoded(text)
    if isinstance(found, list):
        roles = [_speaker(one) for one in found]
        return [role for role in roles if role is not None] if None not in roles else []
    first = _FIRST.match(text)
    who = _WHO.search(first[1]) if first else None
    said = who and re.search(rf"""['"]{_KEYS[who[1]]}['"]\s*:""", first[1] if first else "")
    return [who[2]] if who and said else []


def _speaker(message: Any) -> str | None:
    """Whose a message is, by the names of one dialect; ``None`` of what is no message."""
    if not isinstance(message, Mapping):
        return None
    for who, what in _KEYS.items():
        role = message.get(who)
        if isinstance(role, str) and isinstance(message.get(what), str | list):
            return role
    return None
