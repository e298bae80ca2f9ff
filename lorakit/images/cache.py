"""What is computed once: a picture's latent, and a caption's embedding, kept on the disk.

Each is a file of its own, named after all that decides its content (the picture's bytes, its size
here, its sides, the caption, the weights of what encodes it), so that runs share them, a changed
picture or another base never gets an old one, and a kill leaves whole files or none: what is there
is not computed again. A file that is damaged, or was not written under its name, is made anew.

::

    $LORAKIT_CACHE/images/latents/ab/abcd….safetensors    mean, std, mask
    $LORAKIT_CACHE/images/text/cd/cdef….safetensors       text, pooled

Pictures and captions are encoded one at a time: what comes out may not depend on what was already
there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.core.files import atomic_file, cache_dir
from lorakit.core.safetensors_io import read_safetensors, write_safetensors
from lorakit.data.pictures import laid_on, opened
from lorakit.errors import FormatError
from lorakit.images.base import PictureBase, quiet_diffusers
from lorakit.images.buckets import Placed
from lorakit.images.families import latent_range
from lorakit.images.pictures import Picture, greys_of
from lorakit.optional import require

logger = logging.getLogger(__name__)

#: raised when the same key would get another content
LAYOUT = 3
#: of a file's header; its value is the name under which the file was written
_KEY = "made_for"
#: numbers of each weight that its fingerprint is made of
_SAMPLED = 1 << 16
#: what is kept in memory once it was read
_MEMORY_BYTES = 256 << 20


class Cache:
    """Latents and embeddings of one base.

    Args:
        base: encodes what is not there yet.
        folder: where they are kept; ``None``: ``$LORAKIT_CACHE/images``.
    """

    def __init__(self, base: PictureBase, folder: Path | None = None) -> None:
        self._base = base
        self.folder = (folder or cache_dir() / "images").expanduser()
        self._kept: dict[Path, dict[str, Tensor]] = {}
        self._free = _MEMORY_BYTES
        pipe = base.pipe
        self._vae = "pixels" if pipe.vae is None else fingerprint(pipe.vae)
        encoders = [getattr(pipe, name, None) for name in base.family.text_encoders]
        tokenizers = [
            getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
            for name in base.family.text_encoders
        ]
        self._text = [
            type(pipe).__name__,
            base.text_length,
            pipe.config.get("force_zeros_for_empty_prompt"),
            str(base.placement.dtype),
            *(None if one is None else fingerprint(one) for one in encoders),
            *(_tokenizer_print(one) for one in tokenizers),
        ]

    # --- making ----------------------------------------------------------------------------

    def fill(
        self,
        pictures: Iterable[tuple[Picture, Placed]],
        captions: Iterable[str],
        *,
        on_item: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compute what is missing; gives how many were.

        Args:
            on_item: called with those done and all that there are.
        """
        latents = list(pictures)
        texts = list(dict.fromkeys(captions))
        missing = 0
        for done, (picture, placed) in enumerate(latents, start=1):
            missing += self._ensure(
                self._latent_path(picture, placed),
                partial(encoded_picture, self._base, picture, placed),
            )
            if on_item is not None:
                on_item(done, len(latents) + len(texts))
        for done, caption in enumerate(texts, start=len(latents) + 1):
            missing += self._ensure(
                self._text_path(caption),
                partial(encoded_caption, self._base, caption),
            )
            if on_item is not None:
                on_item(done, len(latents) + len(texts))
        return missing

    @staticmethod
    def _ensure(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Write a file if there is none that can be used; whether it was written."""
        if _read(path) is not None:
            return False
        with atomic_file(path) as temporary:
            write_safetensors(temporary, dict(make()), {_KEY: path.stem})
        return True

    # --- reading ---------------------------------------------------------------------------

    def latent(self, picture: Picture, placed: Placed) -> dict[str, Tensor]:
        """``mean`` [C, h, w] and, of a VAE that draws, ``std``; ``mask`` [1, h, w] of a picture
        that is masked."""
        path = self._latent_path(picture, placed)
        return self._get(path, lambda: encoded_picture(self._base, picture, placed))

    def text(self, caption: str) -> dict[str, Tensor]:
        """``text`` [L, d], and ``pooled`` [d] where the family has it."""
        path = self._text_path(caption)
        return self._get(path, lambda: encoded_caption(self._base, caption))

    def _get(self, path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if path in self._kept:
            return self._kept[path]
        found = _read(path)
        if found is None:  # somebody emptied the cache meanwhile
            self._ensure(path, make)
            found = _read(path)
            assert found is not None
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        if size <= self._free:
            self._kept[path] = found
            self._free -= size
        return found

    # --- names -----------------------------------------------------------------------------

    def _latent_path(self, picture: Picture, placed: Placed) -> Path:
        parts = [self._vae, picture.digest, placed.height, placed.width, picture.masked]
        return self._path("latents", [*parts, "flipped"] if placed.flipped else parts)

    def _text_path(self, caption: str) -> Path:
        return self._path("text", [self._text, caption])

    def _path(self, kind: str, parts: list[Any]) -> Path:
        text = json.dumps([LAYOUT, kind, *parts], ensure_ascii=False)
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; ``None`` if it is not there, damaged, or another's."""
    try:
        found, told = read_safetensors(path)
    except FileNotFoundError:
        return None
    except FormatError as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None
    if told.get(_KEY) != path.stem:  # its names and shapes could be any
        logger.warning("%s is not what was written there and is made again", path)
        return None
    return found


def fingerprint(module: nn.Module) -> str:
    """A hash of a component: its config, and up to 65 536 numbers of each of its weights."""
    config: Any = getattr(module, "config", {})
    told = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    told = {k: v for k, v in told.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        some = flat[::step].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tokenizer_print(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    told = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        tokenizer.model_max_length,
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


# --- encoding ------------------------------------------------------------------------------------


@torch.no_grad()
def encoded_picture(base: PictureBase, picture: Picture, placed: Placed) -> dict[str, Tensor]:
    """A picture's latent as the denoiser knows it, float32 on the CPU; see :meth:`Cache.latent`."""
    pixels, alpha = pixels_of(picture, placed)
    vae = base.pipe.vae
    found = {"mean": pixels}
    if vae is not None:
        made = vae.encode(pixels[None].to(base.placement.device, vae.dtype))
        drawn = not hasattr(made, "latents")  # AutoencoderTiny, for one, has no distribution
        mean = (made.latent_dist.mean if drawn else made.latents)[0].float()
        offset, scale = latent_range(vae, mean)
        found = {"mean": (mean - offset) * scale}
        if drawn:
            found["std"] = made.latent_dist.std[0].float() * scale
    if picture.masked:
        height, width = found["mean"].shape[-2:]
        found["mask"] = _mask(picture, placed, alpha, int(height), int(width))
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def encoded_caption(base: PictureBase, caption: str) -> dict[str, Tensor]:
    """A caption's conditioning on the CPU; see :meth:`Cache.text`."""
    with quiet_diffusers():  # it warns of what is cut, which the data's report says
        made = base.family.encode(base.pipe, [caption], base.text_length)
    return {name: tensor[0].cpu().contiguous() for name, tensor in made.items()}


def pixels_of(picture: Picture, placed: Placed) -> tuple[Tensor, Any]:
    """[3, H, W] float32 in [-1, 1], transparent places white; and the transparency, if any."""
    image = require("PIL.Image", extra="images", purpose="reading pictures")
    read = opened(picture.path.read_bytes())
    alpha = read.getchannel("A") if read.mode == "RGBA" else None
    fitted = _fitted(laid_on(read, "white"), placed, image.Resampling.LANCZOS)
    array = np.asarray(fitted, np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous(), alpha


def _fitted(read: Any, placed: Placed, how: Any) -> Any:
    """A PIL picture scaled, mirrored and cropped to its place."""
    ops = require("PIL.ImageOps", extra="images", purpose="reading pictures")
    height, width = placed.scaled
    if read.size != (width, height):
        read = read.resize((width, height), how)
    if placed.flipped:
        read = ops.mirror(read)
    box = (placed.left, placed.top, placed.left + placed.width, placed.top + placed.height)
    return read.crop(box)


def _mask(picture: Picture, placed: Placed, alpha: Any, height: int, width: int) -> Tensor:
    """[1, h, w] in [0, 1]: the mask's file, else what is not transparent."""
    image = require("PIL.Image", extra="images", purpose="reading pictures")
    if picture.mask is not None:
        alpha = greys_of(opened(picture.mask.read_bytes()))
    fitted = _fitted(alpha, placed, image.Resampling.BOX)
    small = fitted.resize((width, height), image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, np.float32) / 255)[None]
