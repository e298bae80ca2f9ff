"""``speech``: a transcript of a recording, by Whisper and its kind."""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.bases import Base
from lorakit.bases.load import Task as BaseTask
from lorakit.data.columns import checked_text
from lorakit.data.rows import Row, RowError
from lorakit.errors import InputError
from lorakit.layers import Handle
from lorakit.layers.routing import MixLike
from lorakit.optional import require
from lorakit.tasks.forwards import RowTask
from lorakit.tasks.kinds import RowKind, Texts
from lorakit.tasks.names import Recompute
from lorakit.tasks.rows import Fields, Made, RowData, RowExample, RowSpec, load_rows
from lorakit.tasks.seq2seq import answer_ids, decoder_batch, decoder_sums, end_id, generated
from lorakit.tasks.vision import asked_file, file_content, processor_of


@dataclass(frozen=True)
class Speech(RowKind):
    """Speech recognition by an encoder of spectrograms and a decoder of text.

    Args:
        language: of the recordings, as an English name or a code, for a base that knows several;
            ``None`` is what its tokenizer names.
    """

    language: str | None = None

    name: ClassVar[str] = "speech"
    base_task: ClassVar[BaseTask] = "speech"
    fields: ClassVar[Fields] = Fields(
        {
            "audio": ("audio", "file_name", "path", "wav", "recording"),
            "text": ("text", "transcript", "transcription", "sentence", "completion"),
        }
    )
    unit: ClassVar[str] = "frames and tokens"
    text_metrics: ClassVar[bool] = True

    def load_data(self, spec: RowSpec, base: Base) -> RowData:
        texts = Texts(spec, base, "text")
        extractor = processor_of(base, "recordings")
        end, prefix, room = end_id(base), self.prefix_ids(base), _positions(base)
        if room is not None:
            texts.limit = min(texts.limit or room, room)
        frames = int(getattr(base.model.config, "max_source_positions", 1500))

        def make(row: Row, values: Mapping[str, Any]) -> Made:
            content, asked = file_content(values["audio"], row.file, "recording")
            checked_sound(content, asked.name, extractor)
            text = checked_text(values["text"], "the text", "text")
            plain = [i for i in answer_ids(texts, text, end) if i not in prefix]
            # the model puts the first of them in front itself, as it shifts the labels
            labels = [*prefix[1:], *plain]
            learnt = np.arange(len(labels)) >= len(labels) - len(plain)
            key = hashlib.sha256(content).digest()
            inputs = {
                "extractor": extractor,
                "labels": np.array(labels, np.int32),
                "learnt": learnt,
                "asked": asked,
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
        extractor, tokenizer = processor_of(base, "recordings"), base.require_tokenizer()
        model: Any = base.model.eval()
        first = getattr(model.config, "decoder_start_token_id", None)
        prefix = self.prefix_ids(base) or ([first] if first is not None else [])
        room = _positions(base)
        length = max_new_tokens if room is None else min(max_new_tokens, room - len(prefix))
        found = []
        for given in inputs:
            asked = asked_file(given, "recording")
            try:
                checked_sound(asked.read(), asked.name, extractor)
            except RowError as error:
                raise InputError(str(error)) from None
            one = RowExample(0, 0, "", 1, 1, {"asked": asked, "extractor": extractor})
            sound = features([one]).to(base.placement.device, base.placement.dtype)
            batch = {"input_features": sound}
            if prefix:
                batch["decoder_input_ids"] = torch.tensor([prefix], device=sound.device)
            made = generated(model, handle, adapter, batch, length)
            found.append(tokenizer.decode(made[0].tolist(), skip_special_tokens=True).strip())
        return found

    def prefix_ids(self, base: Base) -> list[int]:
        """What stands before a transcript: the start; the language and the task, of a base that
        knows several; and that no times are told.

        Raises:
            InputError: the base knows several languages and none is named, or not the one that is.
        """
        tokenizer = base.require_tokenizer()
        if _is_multilingual(base):
            language = self.language or tokenizer.language
            if language is None:
                raise InputError(
                    f"{base.ref} knows many languages; say which one is spoken, such as "
                    "--language german"
                )
            try:
                tokenizer.set_prefix_tokens(language=language, task="transcribe")
            except ValueError:
                raise InputError(
                    f"--language {language}: Whisper has no such language; give its English name "
                    "or its code, such as german or de"
                ) from None
        elif self.language is not None:
            raise InputError(
                f"--language {self.language}: {base.ref} is not told its language; leave it out"
            )
        return list(getattr(tokenizer, "prefix_tokens", None) or [])


def _is_multilingual(base: Base) -> bool:
    """Whether it is a Whisper of many languages; older ones do not say so, but have a token more
    than those of English alone."""
    if not hasattr(base.tokenizer, "set_prefix_tokens"):
        return False
    model: Any = base.model
    told = getattr(model.generation_config, "is_multilingual", None)
    return bool(model.config.vocab_size >= 51865 if told is None else told)


def _positions(base: Base) -> int | None:
    """Tokens that the decoder has positions for."""
    found: int | None = getattr(base.model.config, "max_target_positions", None)
    return found


def features(examples: Sequence[RowExample]) -> Tensor:
    """Spectrograms, [E, mels, frames], float32."""
    made = []
    for example in examples:
        asked, extractor = example.inputs["asked"], example.inputs["extractor"]
        sound, rate = read_sound(asked.read(), asked.name)
        found = extractor(sound, sampling_rate=rate, return_tensors="pt")
        made.append(found["input_features"])
    return torch.cat(made)


def checked_sound(content: bytes, name: str, extractor: Any) -> None:
    """Refuse a recording that the base cannot take.

    Raises:
        RowError: it is broken, empty, of another rate, longer than the base's window, or holds
            what is no number.
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
    if not np.isfinite(sound).all():
        raise RowError("a broken recording", f"{name} is damaged: some samples are NaN or infinite")
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
    if width > 4:
        raise ValueError(f"its samples have {width} bytes each; expected 1 to 4")
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
