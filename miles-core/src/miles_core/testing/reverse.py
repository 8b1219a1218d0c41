"""The task of the quickstart: reversing strings of digits, with a tiny Qwen3, its tokenizer, and the prompts.

``python -m miles_core.testing.reverse FOLDER`` writes them.

Nothing is downloaded. The weights are random, so all the model ever knows it learns from the reward. The same seed
writes the same bytes, and a folder that this very module has written is left as it is.

A prompt is a string of digits with a letter before each, ``a4b0c9d1>`` for 4091, and the answer is ``1904``. Qwen3
knows distances between tokens, not places; the letters name the places, and let a model of two layers learn in a
minute what takes it several without.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

DIGITS = 4
TRAIN, EVAL = 8000, 256  # prompts; no string of digits is in both
LETTERS = "abcdefg"  # 7 letters, 10 digits, ">" and two special tokens make a vocabulary of 20
SEED = 0


def write_prompts(folder: Path) -> None:
    """``{"prompt": "a4b0c9d1>", "answer": "1904", "wrong": "1604"}`` a line."""
    draw = random.Random(SEED)
    numbers = draw.sample(range(10**DIGITS), TRAIN + EVAL)
    for name, part in {"train": numbers[:TRAIN], "eval": numbers[TRAIN:]}.items():
        write_lines(folder / f"{name}.jsonl", (f"{number:0{DIGITS}}" for number in part), draw)


def write_lines(path: Path, strings: Iterable[str], draw: random.Random) -> None:
    with path.open("w") as file:
        for string in strings:
            marked = "".join(map("".join, zip(LETTERS, string, strict=False)))
            answer = string[::-1]
            row = {"prompt": f"{marked}>", "answer": answer, "wrong": mistaken(answer, draw)}
            file.write(json.dumps(row) + "\n")


def mistaken(answer: str, draw: random.Random) -> str:
    """``answer`` with another digit in one place, for learning from pairs."""
    place = draw.randrange(DIGITS)
    digit = draw.choice([digit for digit in "0123456789" if digit != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def write_model(folder: Path) -> int:
    """A Qwen3 with one token a character, in Hugging Face format; returns how many parameters it has."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789", ">", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))  # no merges: characters
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)

    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 30.0},  # the usual 10,000 tells 1 from 2 too faintly
            initializer_range=0.03,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write(data: Path) -> None:
    """Make ``data`` hold the task; where it does already, nothing is done."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if (data / "made-by").is_file() and (data / "made-by").read_text() == digest:
        print(f"{data} is already there")
        return
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    write_prompts(data)
    parameters = write_model(data / "model")
    (data / "made-by").write_text(digest)  # last: a folder without it is written again
    print(f"{data}: a Qwen3 of {parameters / 1e6:.2f}M random parameters, {TRAIN} prompts, {EVAL} held out")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
