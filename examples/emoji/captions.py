"""Which emoji there are, what each is called, and who may learn from it.

An emoji is the same in all sets if its code points are, whatever a set calls it; a set that does
not state code points is matched by the names that the others have for them. Skin tones are left
out: they would be most of the pictures and say little. The caption is Noto's name for it.

Four parts, by *family*, so that a woman astronaut is never trained on while the man astronaut is
kept for the test:

========= =================================== ==================================================
part      who sees it                         what for
========= =================================== ==================================================
``base``  the base                            drawing at all
``style`` the base, and every style adapter   60 emoji, of each style its own pictures of them
``known`` the base, no adapter                the test: does the style carry over to captions that
                                              only the base has met?
``new``   nobody                              the test: to captions that nobody has met?
``unused`` nobody                             the rest of a family of the three parts above
========= =================================== ==================================================

The classifier and the features that judge (see `judge.py`) learn from the real pictures of
``base`` and ``style``, and are themselves tested on ``known`` and ``new``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["base", "style", "known", "new", "unused"]

NUM_STYLE, NUM_KNOWN, NUM_NEW = 60, 100, 100
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_PRESENTATION = "fe0f"
"""Says only that the colourful form is meant; sets disagree on writing it."""
_GENDERS = frozenset(["man", "woman", "person", "men", "women", "people", "boy", "girl"])


@dataclass(frozen=True)
class Emoji:
    """One emoji, in whichever sets it is drawn."""

    key: str
    """Code points, such as ``1f9d1-200d-1f680``."""
    caption: str
    category: str
    part: Part
    names: Mapping[str, str]
    """Set → the icon's name there."""


def emoji_of(sets: Mapping[str, Mapping[str, Any]], first: str = "noto") -> list[Emoji]:
    """All emoji of the set ``first``, by key.

    Args:
        sets: set → what `packages.contents` found.
        first: the set that captions and categories come from.
    """
    names = {name: _names(content["chars"]) for name, content in sets.items() if content["chars"]}
    categories = {
        icon: category
        for category, icons in sets[first]["metadata"].get("categories", {}).items()
        for icon in icons
    }
    found = []
    for key, icon in names[first].items():
        drawn = {name: there[key] for name, there in names.items() if key in there}
        found.append((key, icon.replace("-", " "), categories.get(icon, "other"), drawn))
    parts = _parts([(caption, category, len(drawn)) for _, caption, category, drawn in found])
    for name in (one for one in sets if one not in names):
        _match(name, sets[name]["icons"], [(icon, drawn) for _, icon, _, drawn in found])
    made = (
        Emoji(k, cap, cat, part, n) for (k, cap, cat, n), part in zip(found, parts, strict=True)
    )
    return sorted(made, key=lambda one: one.key)


def _names(chars: Mapping[str, str]) -> dict[str, str]:
    """Key → the icon's name, without skin tones."""
    found: dict[str, str] = {}
    for written, name in chars.items():
        points = [p for p in written.lower().split("-") if p != _PRESENTATION]
        if not any(int(p, 16) in _SKIN_TONES for p in points):
            found.setdefault("-".join(points), name)
    return found


def _match(
    name: str, icons: Mapping[str, Any], emoji: Sequence[tuple[str, dict[str, str]]]
) -> None:
    """Find the icons of a set by their names, each for one emoji.

    A drawing belongs to who has its name; another name of it (an alias) counts where nobody has:
    in some sets 🆙's is an alias of 🔼's, and a cricket's of the game's.
    """
    taken = set()
    for there in (icons["icons"], icons.get("aliases", {})):
        spelt = {_spelling(one): one for one in reversed(list(there))}
        for first, drawn in emoji:
            ours = (spelt.get(_spelling(one)) for one in (first, *drawn.values()))
            icon = next((one for one in ours if one is not None), None)
            if name in drawn or icon is None or (drawing := _drawing(icons, icon)) in taken:
                continue
            drawn[name] = icon
            taken.add(drawing)


def _drawing(icons: Mapping[str, Any], name: str) -> str:
    """The icon that an alias is of."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    return name


def _spelling(name: str) -> str:
    return name.replace("-", "")


def family(caption: str) -> str:
    """What emoji that must not be told apart by the split have in common."""
    words = [word for word in caption.split() if word not in _GENDERS]
    return " ".join(words or caption.split())


def _parts(rows: Sequence[tuple[str, str, int]]) -> list[Part]:
    """The part of each of (caption, category, number of sets); captions alone decide."""
    most = max(number for *_, number in rows)
    first: dict[str, tuple[str, str]] = {}  # family → caption and category of its first member
    for caption, category, number in rows:
        if number == most:  # the test needs the real picture in every set
            first.setdefault(family(caption), (caption, category))
    left = {one: category for one, (_, category) in first.items()}
    chosen: dict[str, Part] = {}
    counts: tuple[tuple[Part, int], ...] = (
        ("new", NUM_NEW),
        ("known", NUM_KNOWN),
        ("style", NUM_STYLE),
    )
    for part, number in counts:
        for one in _spread(left, number):
            chosen[one] = part
            del left[one]

    def part_of(caption: str) -> Part:
        part = chosen.get(family(caption), "base")
        return part if part == "base" or first[family(caption)][0] == caption else "unused"

    return [part_of(caption) for caption, *_ in rows]


def _spread(families: Mapping[str, str], number: int) -> list[str]:
    """So many families, of every category in proportion."""
    by_category: dict[str, list[str]] = {}
    for one, category in sorted(families.items(), key=lambda pair: _place(pair[0])):
        by_category.setdefault(category, []).append(one)
    order = sorted(
        ((index + 0.5) / len(members), _place(one), one)
        for members in by_category.values()
        for index, one in enumerate(members)
    )
    return [one for *_, one in order[:number]]


def _place(text: str) -> str:
    return hashlib.sha256(f"emoji/{text}".encode()).hexdigest()


def of_part(emoji: Iterable[Emoji], *parts: Part) -> list[Emoji]:
    """Those of some parts."""
    return [one for one in emoji if one.part in parts]
