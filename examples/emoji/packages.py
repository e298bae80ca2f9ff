"""The icon sets: which packages, at which version, with which hash, under which licence.

A package comes from the npm registry, through `npm` where it is installed and by plain HTTPS
where it is not. Either way its SHA-512 must be the one written here, which is the one that the
registry published for this version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class IconSet:
    """One package of drawings, and who drew them."""

    name: str
    """As the project calls it."""
    package: str
    version: str
    integrity: str
    """`sha512-` and the hash of the packed file in base64, as in a package-lock.json."""
    licence: str
    """SPDX."""
    author: str
    source: str


SETS = (
    IconSet(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    IconSet(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    IconSet(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twitter and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    IconSet(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "https://github.com/hfg-gmuend/openmoji",
    ),
    IconSet(
        "high-contrast",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    IconSet(
        "noto-v1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
    ),
    IconSet(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "Mozilla",
        "https://github.com/mozilla/fxemoji",
    ),
    IconSet(
        "emojione",
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    IconSet(
        "emojione-monotone",
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "CC-BY-4.0",
        "Emoji One",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    IconSet(
        "streamline",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "Streamline",
        "https://github.com/webalys-hq/streamline-vectors",
    ),
)


def icon_set(name: str) -> IconSet:
    """The set of this name."""
    return next(one for one in SETS if one.name == name)


def fetch(one: IconSet, folder: Path) -> Path:
    """The packed file of a set, downloaded unless it lies in ``folder`` already.

    Raises:
        ValueError: its hash is another one than is written here.
    """
    packed = folder / f"{one.package.rpartition('/')[2]}-{one.version}.tgz"
    if packed.exists():
        check(one, packed)
        return packed
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        came = _download(one, Path(beside))
        check(one, came)
        os.replace(came, packed)
    return packed


def _download(one: IconSet, folder: Path) -> Path:
    if npm := shutil.which("npm"):
        wanted = f"{one.package}@{one.version}"
        subprocess.run([npm, "pack", "--silent", wanted], cwd=folder, check=True, stdout=2)
        return next(folder.glob("*.tgz"))
    base = one.package.rpartition("/")[2]
    address = f"{REGISTRY}/{one.package}/-/{base}-{one.version}.tgz"
    came = folder / "package.tgz"
    with urllib.request.urlopen(address, timeout=120) as answer, came.open("wb") as file:
        shutil.copyfileobj(answer, file)
    return came


def check(one: IconSet, packed: Path) -> None:
    """Raises:
    ValueError: the file is not the one that the hash was written down of.
    """
    digest = hashlib.sha512(packed.read_bytes()).digest()
    found = "sha512-" + base64.b64encode(digest).decode()
    if found != one.integrity:
        raise ValueError(
            f"{packed} is not {one.package} {one.version}: its hash is {found}, expected "
            f"{one.integrity}. Delete it and run this again."
        )


def contents(packed: Path) -> Mapping[str, Any]:
    """``icons.json``, ``chars.json`` and ``metadata.json`` of a packed file, by their stems."""
    found = {}
    with tarfile.open(packed) as archive:
        for stem in ("icons", "chars", "metadata"):
            file = archive.extractfile(f"package/{stem}.json")
            assert file is not None
            found[stem] = json.load(file)
    return found
