"""Tiny bases of every kind, as folders, and rows for them; nothing is downloaded."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_tokenizer(folder: Path, *, pairs: bool = False) -> None:
    """Words; with ``pairs`` as an encoder has it: ``<s> a </s> b </s>``."""
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if pairs:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", *(["token_type_ids"] if pairs else []), "attention_mask"],
    ).save_pretrained(folder)


def write_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **_IDS,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_bart(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **_IDS,
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    write_tokenizer(folder, pairs=True)
    return folder


def write_bert(folder: Path) -> Path:
    """An encoder without a head, as MiniLM is."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    write_tokenizer(folder, pairs=True)
    return folder


def write_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "size": {"height": 16, "width": 16},
                "do_resize": True,
                "do_normalize": True,
                "do_rescale": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "resample": 2,
            }
        )
    )
    return folder


def write_whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **_IDS,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=1, max_length=32, **_IDS
    )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    # a second of 16,000 samples at a hop of 160 is 100 frames, which the encoder halves to 50
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


def whisper_tokenizer() -> transformers.WhisperTokenizer:
    """Of three languages, by letters; its token ids fit :func:`write_whisper`."""
    marks = ["startoftranscript", "en", "zh", "de", "translate", "transcribe", "notimestamps"]
    letters = ["<|endoftext|>", *"w0123456789", "Ġ"]
    return transformers.WhisperTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)},
        merges=[],
        additional_special_tokens=[f"<|{mark}|>" for mark in marks],
    )


_CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %} {% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def write_smolvlm(folder: Path) -> Path:
    """Idefics3, which SmolVLM is: a picture of 16 pixels is 16 patches and 4 tokens."""
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    names = [*SPECIAL, *marks, "system", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=marks,
        model_input_names=["input_ids", "attention_mask"],
    )
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=_CHAT
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Idefics3Config(
        image_token_id=5,
        scale_factor=2,
        pad_token_id=0,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(names),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 96,
            **_IDS,
        },
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_chats(folder: Path, number: int) -> list[dict]:
    """Chats about red and blue squares."""
    rows = []
    for i, row in enumerate(write_pictures(folder, number)):
        ask = [{"type": "image", "image": row["image"]}, {"type": "text", "text": f"w{i % 9} w2"}]
        answer = f"w{10 if row['label'] == 'red' else 11} w{i % 5}"
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(number: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Texts of unequal length; the class is that of the first word, the answer the words again."""
    draw = np.random.default_rng(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < number:
        words = draw.choice(WORDS[:9], draw.integers(2, 8)).tolist()
        label = "abc"[int(words[0][1:]) % 3]
        text = " ".join(words)
        found.setdefault(text, {"text": text, "label": label, "target": " ".join(words[::-1])})
    return list(found.values())


def write_pictures(folder: Path, number: int) -> list[dict[str, str]]:
    """Red and blue squares with noise."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(number):
        pixels = draw.integers(0, 60, (20, 24, 3)).astype(np.uint8)
        pixels[:, :, 0 if i % 2 else 2] += 150
        name = f"{i}.png"
        Image.fromarray(pixels).save(folder / name)
        rows.append({"image": name, "label": "red" if i % 2 else "blue"})
    return rows


def write_sound(path: Path, frequency: float, *, rate: int = 16000, seconds: float = 0.5) -> Path:
    time = np.arange(int(rate * seconds)) / rate
    samples = (0.4 * np.sin(2 * np.pi * frequency * time) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def write_sounds(folder: Path, number: int) -> list[dict[str, str]]:
    rows = []
    for i in range(number):
        write_sound(folder / f"{i}.wav", 200 + 60 * i)
        rows.append({"audio": f"{i}.wav", "text": " ".join(WORDS[j] for j in range(i % 5 + 1))})
    return rows
