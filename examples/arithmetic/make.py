"""Write what ``run.toml`` needs into ``data/`` beside this file: a tiny Qwen3, its tokenizer, and the sums.

``--size 100M`` writes what ``gpu.toml`` needs into ``data-100M/``: the same with a larger model, made on a GPU.

Nothing is downloaded. The tokenizer has a chat template, and the prompts are chat messages. The model is shown some
sums with their answers first (20 seconds), until it answers a part of them: a reward that is 1 for a right answer and
0 for a wrong one has nothing to say to a model that is never right. The same seed makes the same model, and a folder
that this very script has written is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from itertools import product
from pathlib import Path

TRAIN, EVAL, SHOWN = 5600, 500, 2000  # sums; those held out are in no other set, those shown are not trained on again
WARM_UP_STEPS, WARM_UP_BATCH = 240, 64
SEED = 0
SHAPES = {  # and the learning rate at which it is shown sums
    "tiny": ({"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32}, 1e-3),
    "100M": ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "num_key_value_heads": 6, "head_dim": 64}, 3e-4),
}  # fmt: skip
HERE = Path(__file__).parent
Sum = tuple[int, int]

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def messages(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{a}+{b}"}]


def write_prompts(path: Path, sums: list[Sum]) -> None:
    """``{"prompt": [{"role": "user", "content": "47+58"}], "answer": "105"}`` a line."""
    rows = ({"prompt": messages(a, b), "answer": str(a + b)} for a, b in sums)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, shown: list[Sum], size: str) -> int:
    """A Qwen3 with one token a character, in Hugging Face format; returns how many parameters it has."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from torch.nn.functional import cross_entropy
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, lr = SHAPES[size]
    special = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *"0123456789+"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))  # no merges: characters
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    chat.save_pretrained(folder)

    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            **shape,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 30.0},  # distances are short here
            initializer_range=0.03,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).to(device)

    def encode(a: int, b: int) -> tuple[list[int], list[int]]:
        prompt = chat.apply_chat_template(messages(a, b), add_generation_prompt=True, return_dict=False)
        return prompt, [vocabulary[c] for c in str(a + b)] + [vocabulary["<|end|>"]]

    known, draw = [encode(a, b) for a, b in shown], random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(WARM_UP_STEPS):
        picked = draw.choices(known, k=WARM_UP_BATCH)
        width = max(len(prompt) + len(answer) for prompt, answer in picked)
        rows = [prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in picked]
        labels = [[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in picked]
        logits = model(torch.tensor(rows, device=device)).logits[
            :, :-1
        ]  # padding stands at the end: nothing looks at it
        loss = cross_entropy(logits.flatten(0, 1), torch.tensor(labels, device=device)[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    size = parser.parse_args().size
    data, digest = (
        HERE / ("data" if size == "tiny" else f"data-{size}"),
        hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    )
    if (data / "made-by").is_file() and (data / "made-by").read_text() == digest:
        print(f"{data} is already there")
        return
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    sums = random.Random(SEED).sample(list(product(range(10, 100), repeat=2)), TRAIN + EVAL + SHOWN)
    write_prompts(data / "train.jsonl", sums[:TRAIN])
    write_prompts(data / "eval.jsonl", sums[TRAIN : TRAIN + EVAL])
    parameters = write_model(data / "model", sums[TRAIN + EVAL :], size)
    (data / "made-by").write_text(digest)  # last: a folder without it is written again
    print(f"{data}: a Qwen3 of {parameters / 1e6:.2f}M parameters, {TRAIN} sums, {EVAL} held out")


if __name__ == "__main__":
    main()
