"""Write what ``run.toml`` needs into ``data/`` beside this file: a tiny Qwen3, its tokenizer, and the sums.

Nothing is downloaded. A sum such as ``4719-3058=`` is too hard for a model of this size, but what a tool says of it is
easy to copy. The model is shown some sums first: most with the answer straight away, as a person would write it down,
and some with a call to the tool, masked as the rollout masks it. Afterwards it calls now and then, and does not copy
well yet. The same seed makes the same model, and a folder that this very script has written is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

TRAIN, EVAL, SHOWN = 8000, 256, 4000  # sums; none is in two of them
CALLS = 0.3  # share of the sums shown that are shown with a call
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_LR = 300, 64, 1e-3
SEED = 0
HERE = Path(__file__).parent
SPECIAL = ["<pad>", "<eos>", "<call>", "</call>", "<result>", "</result>"]
CHARACTERS = "0123456789+-*/%.()= :<>abcdefghijklmnopqrstuvwxyz"  # letters are for what goes wrong: "error: too large"

Part = tuple[str, bool]  # text, and whether the policy writes it


def drawn(count: int) -> list[str]:
    """Different sums and differences of two numbers of four digits."""
    draw, found = random.Random(SEED), dict[str, None]()
    while len(found) < count:
        found[f"{draw.randint(1000, 9999)}{draw.choice('+-')}{draw.randint(1000, 9999)}"] = None
    return list(found)


def result(expression: str) -> str:
    sign = "-" if "-" in expression else "+"
    left, right = map(int, expression.split(sign))
    return str(left - right if sign == "-" else left + right)


def demonstration(expression: str, calls: bool) -> list[Part]:
    right = result(expression)
    asked = [(f"<call>{expression}</call>", True), (f"<result>{right}</result>", False)] if calls else []
    return [(f"{expression}=", False), *asked, (f"{right}<eos>", True)]


def write_prompts(path: Path, expressions: list[str]) -> None:
    """``{"prompt": "4719-3058=", "answer": "1661"}`` a line."""
    rows = ({"prompt": f"{expression}=", "answer": result(expression)} for expression in expressions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(folder: Path) -> Any:
    """One token a character, and one for each end of a call and of a result."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))  # no merges: characters
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    return fast


def new_model() -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(SPECIAL) + len(CHARACTERS),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 30.0},  # distances are short here
            initializer_range=0.03,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def show(model: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    """Supervised steps on (tokens, labels); a label of -100 is not learned."""
    import torch
    from torch.nn.functional import cross_entropy

    draw = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR, weight_decay=0.0)
    for _ in range(WARM_UP_STEPS):
        picked = draw.choices(rows, k=WARM_UP_BATCH)
        width = max(len(tokens) for tokens, _ in picked)
        tokens = torch.tensor([row + [0] * (width - len(row)) for row, _ in picked])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in picked])
        logits = model(tokens).logits[:, :-1]  # padding stands at the end: nothing looks at it
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def write_model(folder: Path, shown: list[str]) -> int:
    """A Qwen3 in Hugging Face format that was shown some sums; returns how many parameters it has."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer, model, draw = write_tokenizer(folder), new_model(), random.Random(SEED)
    rows = []
    for expression in shown:
        tokens, labels = list[int](), list[int]()
        for text, learned in demonstration(expression, draw.random() < CALLS):
            ids = tokenizer.encode(text, add_special_tokens=False)
            tokens += ids
            labels += ids if learned else [-100] * len(ids)
        rows.append((tokens, labels))
    show(model, rows)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    data, digest = HERE / "data", hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if (data / "made-by").is_file() and (data / "made-by").read_text() == digest:
        print(f"{data} is already there")
        return
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    sums = drawn(TRAIN + EVAL + SHOWN)
    write_prompts(data / "train.jsonl", sums[:TRAIN])
    write_prompts(data / "eval.jsonl", sums[TRAIN : TRAIN + EVAL])
    parameters = write_model(data / "model", sums[TRAIN + EVAL :])
    (data / "made-by").write_text(digest)  # last: a folder without it is written again
    print(f"{data}: a Qwen3 of {parameters / 1e6:.2f}M parameters, {TRAIN} sums, {EVAL} held out")


if __name__ == "__main__":
    main()
