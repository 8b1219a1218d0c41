"""Miles against TRL's GRPOTrainer: the same tiny model, task, batch, optimizer steps and generated tokens.

    python benchmarks/trl/compare.py --trl-python PATH --size 0.5M --seeds 5 --out benchmarks/results

PATH is an interpreter with TRL in it (``nox -s bench_trl`` makes one). The two take turns, seed by seed; the steady
rate is 64 samples over the median step after the tenth. TRL runs with one and with two threads first, and then with
whichever was faster; Miles has one thread a process, and as many processes at work as ``MODES`` says. Neither side ever
meets an end-of-sequence token, so every completion has 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
SIZES = {"0.5M": (128, 2), "4M": (256, 4)}  # hidden size, layers
SAMPLES, WARM = 64, 10
MODES = {  # how Miles uses two cores
    "sync": {"mode": '"sync"'},  # sampling and training in turns, each in a process of its own
    "overlap": {"mode": '"overlap"'},  # the same two at once
    "parallel": {"mode": '"overlap"', "placement.trainers": 2},  # at once, the batch split between two trainers
}


def write(folder: Path, hidden: int, layers: int) -> int:
    """A random Qwen3 with one token a character, 400 prompts of four letters; returns its parameters."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(192, 192 + 161)]
    vocabulary = {"<pad>": 0, **{c: i + 1 for i, c in enumerate(letters)}, "<eos>": 300}  # 300 is outside the model
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=64,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    prompts = ["".join(draw.choices("abcdefghij0123456789", k=4)) for _ in range(400)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return sum(p.numel() for p in model.parameters())


def trl(python: str, folder: Path, steps: int, seed: int, threads: int, lr: float) -> dict[str, list[float]]:
    out = folder / f"trl-{seed}-{threads}.json"
    ask = [python, HERE / "trl_side.py", folder, "--steps", steps, "--seed", seed, "--threads", threads]
    ask += ["--lr", lr, "--out", out]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(list(map(str, ask)), check=True, capture_output=True, text=True, env=env)
    result: dict[str, list[float]] = json.loads(out.read_text())
    return result


def miles(folder: Path, steps: int, seed: int, lr: float, mode: str) -> dict[str, list[float]]:
    run_dir = folder / f"miles-{mode}-{seed}"
    keys = {"steps": steps, "seed": seed, "optim.lr": lr, "run_dir": f'"{run_dir}"', **MODES[mode]}
    ask = [str(Path(sys.executable).with_name("miles")), "run", str(HERE / "run.toml")]
    subprocess.run(ask + [x for k, v in keys.items() for x in ("--set", f"{k}={v}")], check=True, capture_output=True)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_s": [after["time_s"] - before["time_s"] for before, after in pairwise(rows)],
        "reward": [row["reward/mean"] for row in rows],
        "tokens": [row["rollout/tokens"] for row in rows],
    }


def steady(run: dict[str, list[float]]) -> float:
    """Samples per second."""
    return SAMPLES / median(run["step_s"][WARM:-1])


def compare(python: str, size: str, seeds: int, steps: int, lr: float, modes: list[str]) -> dict[str, Any]:
    folder = HERE.parents[1] / "runs" / "trl"
    parameters = write(folder, *SIZES[size])
    probe = {threads: steady(trl(python, folder, 30, 99, threads, lr)) for threads in (1, 2)}
    threads = max(probe, key=lambda n: probe[n])
    rows = []
    for seed in range(seeds):
        sides = {"trl": trl(python, folder, steps, seed, threads, lr)}
        for mode in modes:
            sides[mode] = miles(folder, steps, seed, lr, mode)
        row: dict[str, Any] = {"seed": seed}
        for name, run in sides.items():
            row[name] = {
                "samples_per_s": round(steady(run), 1),
                "first_reward": round(mean(run["reward"][:10]), 4),
                "last_reward": round(mean(run["reward"][-10:]), 4),
                "tokens": sum(run["tokens"]),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    ratio = {
        mode: round(median(row[mode]["samples_per_s"] / row["trl"]["samples_per_s"] for row in rows), 3)
        for mode in modes
    }
    return {
        "size": size, "parameters": parameters, "steps": steps, "lr": lr, "trl_threads": threads,
        "trl_probe": {str(k): round(v, 1) for k, v in probe.items()}, "ratio": ratio, "rows": rows,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--size", choices=SIZES, default="0.5M")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    asked = parser.parse_args()
    result = compare(asked.trl_python, asked.size, asked.seeds, asked.steps, asked.lr, asked.modes)
    asked.out.mkdir(exist_ok=True)
    (asked.out / f"trl-{asked.size}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio"]))


if __name__ == "__main__":
    main()
