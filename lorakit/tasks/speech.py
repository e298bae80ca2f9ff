"""``speech``: a transcript of a recording, by Whisper and its kind."""

from __future__ import annotations

import hashlib
import io
import os
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row, RowError
from lorakit.errors import InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.optional import require
from lorakit.tasks.forwards import RowTask
from lorakit.tasks.kinds import RowKind, Texts, tokenizer_of
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows
from lorakit.tasks.seq2seq import answer_ids, decoder_batch, decoder_sums, end_id, generated
from lorakit.tasks.vision import file_bytes, processor_of


@dataclass(frozen=True)
class Speech(RowKind):
    """Speech recognition by an encoder of spectrograms and a decoder of text."""

    name: ClassVar[str] = "speech"
    base_task: ClassVar[str] = "speech"
    fields: ClassVar[Fields] = Fields(
        {
            "audio": ("audio", "file_name", "path", "wav", "recording"),
            "text": ("text", "transcript", "transcription", "sentence", "completion"),
        }
    )
    unit: ClassVar[str] = "frames and tokens"
    text_metrics: ClassVar[bool] = True
    asks_for: ClassVar[str] = "recording"

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        texts = Texts(spec, base, "text")
        extractor = processor_of(base, "recordings")
        end, prefix = end_id(base), prefix_ids(base)
        frames = int(getattr(base.model.config, "max_source_positions", 1500))

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            content, name = _sound_bytes(values["audio"], row.file)
            checked_sound(content, name, extractor)
            text = checked_text(values["text"], "the text", "text")
            plain = [i for i in answer_ids(texts, text, end) if i not in prefix]
            # the model puts the first of them in front itself, as it shifts the labels
            labels = [*prefix[1:], *plain]
            learnt = np.arange(len(labels)) >= len(labels) - len(plain)
            key = hashlib.sha256(content).digest()
            inputs = {
                "source": name if os.path.isfile(name) else content,
                "extractor": extractor,
                "labels": np.array(labels, np.int32),
                "learnt": learnt,
                "asked": name,
                "expected": text,
            }
            size = frames + len(labels)
            return Made(inputs, size, len(plain), key + text.encode(), key)

        return load_rows(spec, self.fields, make, task=self.name, unit=self.unit)

    def on(self, model: nn.Module, handle: Handle | None, recompute: Recompute = "none") -> RowTask:
        def batch(examples: Sequence[RowExample]) -> dict[str, Tensor]:
            return {"input_features": features(examples), **decoder_batch(model, examples)}

        return RowTask(model, handle, batch, decoder_sums, recompute=recompute)

    @torch.no_grad()
    def predict(
        self,
        base: Base,
        handle: Handle | None,
        adapter: MixLike,
        inputs: Sequence[Any],
        max_new_tokens: int,
    ) -> list[str]:
        """Greedy transcripts."""
        extractor, tokenizer = processor_of(base, "recordings"), tokenizer_of(base)
        model: Any = base.model.eval()
        found = []
        for path in inputs:
            if not os.path.isfile(str(path)):
                raise InputError(f"{path}: there is no such recording")
            try:
                checked_sound(Path(path).read_bytes(), str(path), extractor)
            except RowError as error:
                raise InputError(str(error)) from None
            one = RowExample(0, 0, "", 1, 1, {"source": str(path), "extractor": extractor})
            sound = features([one]).to(base.placement.device, base.placement.dtype)
            first = getattr(model.config, "decoder_start_token_id", None)
            prefix = prefix_ids(base) or ([first] if first is not None else [])
            given = {"input_features": sound}
            if prefix:
                given["decoder_input_ids"] = torch.tensor([prefix], device=sound.device)
            room = getattr(model.config, "max_target_positions", None)
            length = max_new_tokens if room is None else min(max_new_tokens, room - len(prefix))
            made = generated(model, handle, adapter, given, length)
            found.append(tokenizer.decode(made[0].tolist(), skip_special_tokens=True).strip())
        return found


def prefix_ids(base: Base) -> list[int]:
    """What stands before a transcript (start, language, task, no times), as the tokenizer says."""
    return list(getattr(base.tokenizer, "prefix_tokens", None) or [])


def features(examples: Sequence[RowExample]) -> Tensor:
    """Spectrograms, [E, mels, frames], float32."""
    made = []
    for example in examples:
        source, extractor = example.inputs["source"], example.inputs["extractor"]
        content = Path(source).read_bytes() if isinstance(source, str) else source
        sound, rate = read_sound(content, "recording")
        found = extractor(sound, sampling_rate=rate, return_tensors="pt")
        made.append(found["input_features"])
    return torch.cat(made)


def checked_sound(content: bytes, name: str, extractor: Any) -> None:
    """Refuse a recording that the base cannot take.

    Raises:
        RowError: it is broken, empty, of another rate, or longer than the base's window.
    """
    sound, rate = read_sound(content, name)
    wanted = extractor.sampling_rate
    if rate != wanted:
        raise RowError(
            "another sampling rate",
            f"{name} has {rate} samples a second and the base takes {wanted}; convert it, such as "
            f"with ffmpeg -i IN -ar {wanted} -ac 1 OUT.wav",
        )
    if not len(sound):
        raise RowError("an empty recording", f"{name} holds no sound")
    seconds, most = len(sound) / rate, getattr(extractor, "chunk_length", None)
    if most is not None and seconds > most:
        raise RowError(
            f"longer than {most} seconds", f"{name}: {seconds:.1f} seconds; cut it into parts"
        )


def read_sound(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples in [-1, 1], [n] float32 of one channel (several are averaged), and their rate.

    WAV files of whole numbers are read by Python itself, all else by soundfile.

    Raises:
        RowError: it is broken, or of a kind that cannot be read.
    """
    if content[:4] == b"RIFF":
        try:
            return _wave(content)
        except (wave.Error, EOFError, ValueError) as error:
            if "unknown format" not in str(error):
                raise RowError("a broken recording", f"{name} is damaged: {error}") from None
    soundfile = require("soundfile", extra="speech", purpose="recordings other than plain WAV")
    try:
        sound, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise RowError("a broken recording", f"{name} cannot be read as sound: {error}") from None
    return sound.mean(1), int(rate)


def _wave(content: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(content)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = file.readframes(file.getnframes())
        if len(raw) != file.getnframes() * width * channels:
            raise ValueError("it ends before its last sample")
    if width == 1:
        values = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        bytes_ = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(bytes_), 4), np.uint8)
        wide[:, 1:] = bytes_
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        kind = {2: "<i2", 4: "<i4"}[width]
        values = np.frombuffer(raw, kind).astype(np.float32) / 2 ** (8 * width - 1)
    return values.reshape(-1, channels).mean(1).astype(np.float32), rate


def _sound_bytes(value: Any, file: str) -> tuple[bytes, str]:
    return file_bytes(value, file, "recording")
