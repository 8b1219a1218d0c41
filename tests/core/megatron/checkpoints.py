"""One of the two processes of ``test_checkpoints.py``: checkpoints whose writing goes wrong."""

import errno
import gc
import json
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from core.megatron.layouts import built, forward, gathered, loss, micro_batches
from miles_core.edges.lasting import RunState
from miles_core.edges.megatron import device
from miles_core.edges.store.folder import RunFolder

OPTIM = {"lr": 1e-2, "schedule": "cosine", "warmup": 2}


def trained(folder: Path, steps: int):
    """A new model after ``steps`` updates, and what makes another."""
    case = torch.load(folder / "cases.pt")["qwen3"]
    plugin, model = built(folder / "qwen3", {}, dist.get_world_size(), OPTIM)
    batches = micro_batches(case, model.layout, "packed")

    def step() -> None:
        model.run(batches, forward(plugin), loss)
        model.step(lambda norm: None)

    for _ in range(steps):
        step()
    return model, step


def begin(store: RunFolder, step: int) -> Path:
    """The rank 0 plays the driver."""
    where = [store.begin(step) / "policy" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where)
    return where[0]


def commit(store: RunFolder, folder: Path, step: int) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        store.commit(folder.parent, RunState(step=step))
    dist.barrier()


def die(folder: Path) -> None:
    """A checkpoint, then one in whose midst the kernel kills rank 1; rank 0 trains on and hears of it."""
    store = RunFolder(folder / "run", keep=2)
    model, step = trained(folder, 1)
    weights = gathered(model.export())
    first = begin(store, 1)
    model.save(first)()
    commit(store, first, 1)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
    step()
    second = begin(store, 2)
    write = model.save(second)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with ThreadPoolExecutor(1) as behind:
        writing = behind.submit(write)
        with pytest.raises(RuntimeError, match="(?i)closed|reset|connection"):
            writing.result(60)
    assert (second / "__1_0.distcp").stat().st_size == 50_000


def resume(folder: Path) -> None:
    """From the checkpoint before, and on to the next."""
    store, said = RunFolder(folder / "run", keep=2), []
    found, state = store.newest(said.append)
    assert (found.name, state.step, said) == ("step-000001", 1, [])
    model, step = trained(folder, 0)
    model.load(found / "policy")
    expected = torch.load(folder / "weights.pt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in gathered(model.export()).items())
    step()
    again = begin(store, 2)
    model.save(again)()
    commit(store, again, 2)
    assert store.newest(said.append)[1].step == 2 and not said


def full(folder: Path) -> None:
    """A disk without room for the file of rank 1, then for the list of all parts; asked again, what is lacking is
    written, of the moment of the save."""
    model, step = trained(folder, 1)
    for name in ("__1_0.distcp", ".metadata.tmp"):
        if dist.get_rank() == 0:
            (folder / "full").mkdir(exist_ok=True)
            (folder / "full" / name).unlink(missing_ok=True)
            (folder / "full" / name).symlink_to("/dev/full")
        dist.barrier()
        write = model.save(folder / "full")
        saved = gathered(model.export())
        step()
        for _ in range(2):
            with pytest.raises(OSError, match=f"could not be written: {folder}/full/{name[:9]}.*No space left") as told:
                write()
            assert told.value.errno == errno.ENOSPC
        gc.collect()
        first = folder / "full" / "__0_0.distcp"
        before = first.stat().st_mtime_ns
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "full" / name).unlink()
        dist.barrier()
        write()
        assert first.stat().st_mtime_ns == before  # what is whole is not written once more
        model.load(folder / "full")
        assert all(torch.equal(tensor, saved[name]) for name, tensor in gathered(model.export()).items())
        dist.barrier()
    model.save(folder / "room")()
    model.load(folder / "room")


def main(what: str, rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{what}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    device.install()
    {"die": die, "resume": resume, "full": full}[what](folder)
    if what != "die":
        dist.destroy_process_group()
    print(json.dumps("done"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
