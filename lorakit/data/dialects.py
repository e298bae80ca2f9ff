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

_NAMES = {*ROLES, *OTHER_ROLES}
_BEGINS = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_SAYS_WHO = re.compile(rf"""['"](?:role|from)['"]\s*:\s*['"](?:{"|".join(sorted(_NAMES))})['"]""")


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
    """Whether a text begins as messages do in JSON or as Python prints them, whole or cut."""
    return bool(_BEGINS.match(text) and _SAYS_WHO.search(text))
