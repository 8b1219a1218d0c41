"""TRL's GRPOTrainer on the benchmark's model and prompts; runs in an environment of its own.

    python trl_side.py FOLDER --steps 100 --seed 0 --threads 1 --lr 1e-3 --out steps.json

Writes {"step_s": [...], "reward": [...], "tokens": [...]}, one entry a step.
"""

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked.threads)}

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(asked.threads)
    rows = [json.loads(line) for line in (asked.folder / "train.jsonl").read_text().splitlines()]
    done: dict[str, list[float]] = {"step_s": [], "reward": [], "tokens": []}

    def sevens(completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        rewards = [text.count("7") / max(len(text), 1) for text in completions]
        done["reward"].append(sum(rewards) / len(rewards))
        done["tokens"].append(sum(map(len, completion_ids)))
        return rewards

    class Clock(TrainerCallback):
        """From the end of one step to the end of the next, as Miles' own lines of metrics tell its steps apart."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.told = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            before, self.told = self.told, time.perf_counter()
            done["step_s"].append(self.told - before)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked.folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(asked.folder / "model"),
        reward_funcs=sevens,
        train_dataset=Dataset.from_dict({"prompt": [row["prompt"] for row in rows]}),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(asked.out.with_suffix("")), use_cpu=True, bf16=False, seed=asked.seed, report_to=[],
            per_device_train_batch_size=64, num_generations=8, max_completion_length=32, max_steps=asked.steps,
            save_strategy="no", logging_strategy="no", disable_tqdm=True, beta=0.0, gradient_checkpointing=False,
            temperature=1.0, top_k=0, top_p=1.0, learning_rate=asked.lr, lr_scheduler_type="linear",
            weight_decay=0.0, max_grad_norm=1.0,
        ),
    )  # fmt: skip
    trainer.train()
    asked.out.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
