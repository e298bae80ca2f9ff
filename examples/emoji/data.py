"""Packages → pictures in one file, and a folder of captioned pictures per style.

``DATA/pictures.npz`` holds one array per set, ``[N, 32, 32, 3]`` uint8, and which emoji each row
is; ``DATA/emoji.json`` holds the emoji; ``DATA/styles/NAME/`` is what `lorakit images train` reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.emoji import artwork, captions, packages

SIZE = 32
#: set that the base learns → what stands behind its captions; the first is called by name alone
BASE_SETS = {
    "noto": "",
    "fluent-flat": ", flat",
    "noto-v1": ", blob",
    "fxemoji": ", firefox",
    "emojione": ", emojione",
    "emojione-monotone": ", monotone",
    "streamline": ", streamline",
    "fluent-flat-outlined": ", outlined",
    "fluent-flat-lined": ", lined",
}
#: hands that nobody drew, made of a set's drawings → the set, and whether its colours stay
INKED = {"fluent-flat-outlined": ("fluent-flat", True), "fluent-flat-lined": ("fluent-flat", False)}
STYLES = ("twemoji", "openmoji", "high-contrast")
#: the sets that pictures are judged by
JUDGED = ("noto", "fluent-flat", *STYLES)
#: the base's hand that the styles begin from: without shades and gloss, as theirs
FROM = "fluent-flat"


def make(folder: Path) -> dict[str, Any]:
    """Fetch, draw and split; what was made, as counts."""
    sets = {
        one.name: packages.contents(packages.fetch(one, folder / "packages"))
        for one in packages.SETS
    }
    emoji = [with_inked(one) for one in captions.emoji_of(sets)]
    write(emoji, draw_all(emoji, sets), folder)
    parts: dict[str, int] = {}
    for one in emoji:
        parts[one.part] = parts.get(one.part, 0) + 1
    return {
        "emoji": len(emoji),
        "parts": parts,
        "sets": {s: len(n) for s, n in _rows(emoji).items()},
    }


def with_inked(one: captions.Emoji) -> captions.Emoji:
    """An emoji that is also in the sets that are made of another's drawings."""
    made = {name: one.names[of] for name, (of, _) in INKED.items() if of in one.names}
    return replace(one, names={**one.names, **made})


def draw_all(
    emoji: Iterable[captions.Emoji], sets: Mapping[str, Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Set → pictures [N, SIZE, SIZE, 3], in the order of the emoji that the set has."""
    inked = [name for name, (of, _) in INKED.items() if of in sets]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in (*sets, *inked)}
    for one in emoji:
        for name, icon in one.names.items():
            of, colours = INKED.get(name, (name, None))
            document = artwork.svg(sets[of]["icons"], icon)
            picture = (
                artwork.draw(document, SIZE)
                if colours is None
                else artwork.inked(document, SIZE, colours=colours)
            )
            drawn[name].append(picture)
    return {name: np.stack(pictures) for name, pictures in drawn.items()}


def write(emoji: list[captions.Emoji], drawn: Mapping[str, np.ndarray], folder: Path) -> None:
    """The two files, and the folders of the styles."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "emoji.json").write_text(json.dumps([asdict(one) for one in emoji], indent=0))
    np.savez_compressed(folder / "pictures.npz", **drawn)
    pictures = Pictures(emoji, drawn)
    for style in STYLES:
        write_style(pictures, style, folder / "styles" / style)


def write_style(pictures: Pictures, style: str, folder: Path) -> None:
    """60 captioned pictures of one style, as an image folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for one in captions.of_part(pictures.emoji, "style"):
        name = f"{one.key}.png"
        Image.fromarray(pictures.of(style, one)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": told(one)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def told(one: captions.Emoji) -> str:
    """The caption by which the base draws an emoji in the hand that the styles begin from."""
    return one.caption + BASE_SETS[FROM]


class Pictures:
    """Emoji and their pictures in each set."""

    def __init__(self, emoji: list[captions.Emoji], drawn: Mapping[str, np.ndarray]) -> None:
        self.emoji = emoji
        self._drawn = drawn
        self._rows = _rows(emoji)

    @classmethod
    def read(cls, folder: Path) -> Pictures:
        """What `make` has written."""
        rows = json.loads((folder / "emoji.json").read_text())
        with np.load(folder / "pictures.npz") as file:
            return cls([captions.Emoji(**row) for row in rows], dict(file))

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self._drawn)

    @property
    def by_hand(self) -> tuple[str, ...]:
        """The sets that somebody drew."""
        return tuple(name for name in self._drawn if name not in INKED)

    def of(self, name: str, one: captions.Emoji) -> np.ndarray:
        """One picture of a set, [SIZE, SIZE, 3] uint8."""
        return self._drawn[name][self._rows[name][one.key]]

    def has(self, name: str, one: captions.Emoji) -> bool:
        return one.key in self._rows.get(name, {})

    def for_base(self) -> tuple[np.ndarray, list[str]]:
        """What the base learns: pictures [N, SIZE, SIZE, 3] uint8, and their captions."""
        drawn, told = [], []
        for one in captions.of_part(self.emoji, "base", "style", "known"):
            for name, behind in BASE_SETS.items():
                if self.has(name, one):
                    drawn.append(self.of(name, one))
                    told.append(one.caption + behind)
        return np.stack(drawn), told


def _rows(emoji: Iterable[captions.Emoji]) -> dict[str, dict[str, int]]:
    """Set → key → row of its pictures."""
    rows: dict[str, dict[str, int]] = {}
    for one in emoji:
        for name in one.names:
            there = rows.setdefault(name, {})
            there[one.key] = len(there)
    return rows
