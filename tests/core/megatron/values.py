"""One process of ``test_values.py``: critics and cached references in each layout of its ranks."""

import resource
import signal
import sqlite3
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from core.megatron.batches import pack
from core.megatron.layouts import SGD, TWO, micro_batches, summed
from miles_core.config import RunConfig
from miles_core.edges.megatron import Megatron, device
from miles_core.types import Batch, Output, Refused, Role

ONE: list[dict] = [{}]


def built(folder: Path, table: dict, name: str, role: Role, optim: dict | None = None):
    """A model, and the forward pass that counts how often it is run."""
    world = {"trainers": dist.get_world_size()}
    run = RunConfig(algorithm="none", model={"path": folder}, optim=optim or SGD, placement=world, steps=10, seed=3)
    plugin, calls = Megatron(Megatron.Config(**table), run), []

    def forward(module, batch):
        calls.append(len(batch.tokens))
        return plugin.miles_forward(name, module, batch)

    return plugin.miles_model(name, role), forward, calls


def critic(folder: Path, table: dict, optim: dict | None = None):
    return built(folder, table, "critic", Role(trained=True, head="value", path=str(folder)), optim)[:2]


def loss(batch: Batch, output: Output) -> torch.Tensor:
    return (batch.columns["weight"] * output.values).sum()


def rows_of(case: dict, layout, split: str) -> list[list[int]]:
    """Which sequences ``micro_batches`` gives this rank, row by row."""
    numbered = case | {"sequences": [[i] for i in range(len(case["sequences"]))]}
    numbered["weights"] = [[0.0]] * len(case["sequences"])
    return [batch.tokens.tolist() for batch in micro_batches(numbered, layout, split)]


def check_values(model, forward, case: dict, expected: list[torch.Tensor], split: str) -> None:
    """Of every trained token, that of the state it is drawn in, at any temperature; 0 elsewhere."""
    batches = micro_batches(case, model.layout, split)
    outputs = model.run(batches, forward, None)
    assert len(outputs) == (len(batches) if model.layout.last_stage else 0)
    for which, batch, output in zip(rows_of(case, model.layout, split), batches, outputs, strict=False):
        assert output.logprobs is None and output.entropy is None and not output.values.requires_grad
        whole = torch.cat([expected[i] for i in which]) if which else torch.empty(0, dtype=torch.float64)
        torch.testing.assert_close(output.values.double(), whole * batch.mask, rtol=1e-4, atol=2e-5)


def check_critic(folder: Path, table: dict, case: dict, split: str) -> None:
    """Values, loss and the norm of the gradient are those of transformers in float64, before a step and after it."""
    model, forward = critic(folder, table)
    check_values(model, forward, case, case["before"], split)
    losses = []

    def counted(batch: Batch, output: Output) -> torch.Tensor:
        total = loss(batch, output)
        losses.append(float(total.detach()) * model.layout.reports)
        return total

    model.run(micro_batches(case, model.layout, split), forward, counted)
    assert summed(sum(losses)) == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    metrics, skipped = model.step(lambda norm: None)
    assert skipped is None and metrics["grad_norm"] == pytest.approx(case["norm"], rel=1e-5)
    check_values(model, forward, case, case["after"], split)


def check_resume(folder: Path, table: dict, case: dict, out: Path) -> None:
    """A step, a checkpoint, a new critic, two steps more: the same values, bit by bit."""
    optim = {"lr": 1e-2, "schedule": "cosine", "warmup": 2}

    def step(model, forward) -> dict[str, float]:
        model.run(micro_batches(case, model.layout, "packed"), forward, loss)
        return model.step(lambda norm: None)[0]

    def said(model, forward) -> list[torch.Tensor]:
        return [o.values for o in model.run(micro_batches(case, model.layout, "packed"), forward, None)]

    straight = critic(folder, table, optim)
    step(*straight)
    straight[0].save(out / "critic")()
    resumed = critic(folder, table, optim)
    resumed[0].load(out / "critic")
    assert [step(*straight) for _ in range(2)] == [step(*resumed) for _ in range(2)]
    for one, two in zip(said(*straight), said(*resumed), strict=True):
        assert torch.equal(one, two)


def frozen(folder: Path, table: dict, cache: Path | None):
    return built(folder, table, "ref", Role(path=str(folder), cache=cache and str(cache)))


def check_cache(models: Path, table: dict, case: dict, out: Path) -> None:
    """A sequence is computed once, by whichever rank and in whatever row; other weights or temperatures anew."""
    folder = models / "qwen3"
    plain, forward, _ = frozen(folder, table, None)
    mine = micro_batches(case, plain.layout, "packed")
    expected = plain.run(mine, forward, None)

    def computed(folder: Path, batches: list[Batch], expected: list[Output] | None = None) -> int:
        """Micro-batches that went through the model of a new process's cached reference, over all ranks."""
        model, forward, calls = frozen(folder, table, out)
        outputs = model.run(batches, forward, None)
        assert len(outputs) == (len(batches) if model.layout.last_stage else 0)
        for found, known in zip(outputs, expected or outputs, strict=True):
            torch.testing.assert_close(found.logprobs, known.logprobs, rtol=0, atol=1e-5)
        first = len(calls)
        model.run(batches, forward, None)
        assert len(calls) == first  # what one process has computed it does not compute again
        return int(summed(first))

    assert computed(folder, mine, expected) > 0
    assert computed(folder, mine, expected) == 0
    # the other replica's sequences, one a row
    pairs = list(zip(case["sequences"], case["weights"], strict=True))[:: 1 if plain.layout.dp_rank else -1]
    singles = [pack([s], [w], case["temperature"]) for s, w in pairs]
    assert computed(folder, singles) == 0
    warm = [pack([s], [w], 1.0) for s, w in pairs]
    assert computed(folder, warm) > 0
    assert computed(models / "moved", mine) > 0
    assert computed(models / "moved", mine) == 0
    assert len(list(out.glob("*.sqlite"))) == 2
    model, forward, _ = frozen(folder, table, out)
    with pytest.raises(ValueError, match="ref is frozen"):
        model.run(mine, forward, loss)
    with pytest.raises(ValueError, match="ref is frozen"):
        model.step(lambda norm: None)


def few_and_many() -> tuple[list[Batch], list[Batch]]:
    draw = torch.Generator().manual_seed(2)
    rows = [[torch.randint(0, 50, (60,), generator=draw).tolist() for _ in range(200)] for _ in range(4)]
    weights = [[0.0] + [1.0] * 59] * 200
    return [pack(rows[0][:3], weights[:3])], [pack(row, weights) for row in rows]


def write_and_die(models: Path, out: Path) -> None:
    """The system ends this process in the middle of writing a row's file."""
    few, many = few_and_many()
    model, forward, _ = frozen(models / "qwen3", {}, out)
    model.run(few, forward, None)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    model.run(many, forward, None)


def read_after_death(models: Path, out: Path) -> None:
    few, many = few_and_many()
    for expected in (4, 0):
        model, forward, calls = frozen(models / "qwen3", {}, out)
        model.run(few, forward, None)
        assert calls == []  # what was whole before is whole still
        model.run(many, forward, None)
        assert len(calls) == expected


def damaged_and_shared(models: Path, out: Path) -> None:
    """What SQLite says of a file is said with its name, and with what to do."""
    few, many = few_and_many()
    model, forward, _ = frozen(models / "qwen3", {}, out)
    model.run(few, forward, None)
    (file,) = out.glob("*.sqlite")
    device.import_megatron("miles_core.edges.megatron.cached").WAIT_S = 0.2
    model, forward, _ = frozen(models / "qwen3", {}, out)
    with closing(sqlite3.connect(file)) as another:
        another.execute("BEGIN EXCLUSIVE")  # a run that shares the folder, and writes
        with pytest.raises(
            Refused, match=rf"{file} is locked: another run .* resume when that is done, or name a folder"
        ):
            model.run(many, forward, None)
        with pytest.raises(Refused, match=f"{file} is locked"):
            frozen(models / "qwen3", {}, out)
    model.run(many, forward, None)  # once the other is done
    with file.open("r+b") as bytes_of:
        bytes_of.write(b"not a database at all")
    with pytest.raises(Refused, match=rf"{file} is damaged \(file is not a database\); delete it: what it held is"):
        frozen(models / "qwen3", {}, out)
    file.unlink()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE rows (key BLOB PRIMARY KEY, logprobs BLOB)")
        database.execute("INSERT INTO rows VALUES (x'00', x'0000')")
    with pytest.raises(Refused, match=f"{file} is damaged"):  # half a number
        frozen(models / "qwen3", {}, out)
    (out / "a file").write_text("")
    model, forward, _ = frozen(models / "qwen3", {}, out / "a file" / "below")
    with pytest.raises(Refused, match="cannot be written"):
        model.run(few, forward, None)


def main(what: str, rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{what}-{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    device.install()
    from megatron.core import parallel_state as mpu

    cases = torch.load(folder / "cases.pt")
    if what != "layouts":
        {"die": write_and_die, "read": read_after_death, "faults": damaged_and_shared}[what](
            folder / "policies", folder / ("faults" if what == "faults" else "killed")
        )
        return
    for number, table in enumerate(ONE if world == 1 else TWO):
        for name, case in cases.items():
            check_critic(folder / name, table, case, "packed")
        check_critic(folder / "qwen3", table, cases["qwen3"], "single")
        check_resume(folder / "llama", table, cases["llama"], folder / f"out{world}{number}")
        check_cache(folder / "policies", table, cases["qwen3"], folder / f"cache{world}{number}")
        mpu.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
