"""A checkpoint is whole, or it does not count."""

import errno

import pytest
from miles_core.config import RunConfig
from miles_core.edges.lasting import RunState
from miles_core.edges.store import Folder
from miles_core.edges.store.folder import WHOLE, RunFolder


@pytest.fixture
def store(tmp_path):
    return RunFolder(tmp_path / "run", keep=2)


def write(store, step, text="weights"):
    folder = store.begin(step)
    (folder / "policy").mkdir()
    (folder / "policy" / "rank-0").write_text(text * 100)
    return store.commit(folder, RunState(step=step, position=step * 10))


def newest(store):
    said = []
    return store.newest(said.append), said


def test_the_newest_comes_back_with_its_state(store):
    for step in (5, 10):
        write(store, step)
    (folder, state), said = newest(store)
    assert (folder.name, state.step, state.position, said) == ("step-000010", 10, 100, [])


def test_old_ones_go_only_after_a_new_one_is_whole(store):
    for step in (1, 2, 3):
        write(store, step)
    assert sorted(p.name for p in (store._dir / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    store = RunFolder(tmp_path / "run", keep=2, keep_every=4)
    for step in range(2, 15, 2):
        write(store, step)
    kept = sorted(path.name for path in (store._dir / "checkpoints").iterdir())
    assert kept == [f"step-{step:06d}" for step in (4, 8, 12, 14)]


@pytest.mark.parametrize(
    "every, kept, said",
    [
        (0, 4, "4, but none is written before the last step; set checkpoint.every"),
        (3, 4, "no multiple of checkpoint.every = 3: most of the steps to keep are never written; make it 3"),
        (10, 4, "make it 10"),
        (2, 4, None),
        (3, 0, None),
        (0, 0, None),
    ],
)
def test_steps_to_keep_that_are_never_written_are_refused(every, kept, said):
    keys = {"algorithm": "x", "model": {"path": "m"}, "checkpoint": {"every": every, "keep_every": kept}}
    told = []
    plugin = Folder(Folder.Config(), RunConfig.model_validate(keys))
    plugin.miles_check(complain=lambda key, message: told.append((key, message)), tables={}, roles={})
    assert not told if said is None else told[0][0] == "checkpoint.keep_every" and said in told[0][1]


def test_one_that_met_a_full_disk_does_not_count_until_it_is_written_whole(store):
    write(store, 1)
    folder = store.begin(2)
    (folder / "rank-0").write_text("weights")
    (folder / "state.pkl").symlink_to("/dev/full")
    (folder / WHOLE).write_text('{"state.pkl')  # of an attempt that came further
    state = RunState(step=2)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as raised:
            store.commit(folder, state)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(folder))
        assert newest(store)[0][1].step == 1
    (folder / "state.pkl").unlink()
    assert store.commit(folder, state).name == "step-000002"
    assert newest(store) == ((store._dir / "checkpoints" / "step-000002", state), [])


def test_one_whose_name_alone_was_not_durable_is_whole_when_it_is_asked_again(store, monkeypatch):
    folder, synced = store.begin(1), []

    def full(path):
        synced.append(path)
        if path == folder.parent:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("miles_core.edges.store.folder.sync", full)
    with pytest.raises(OSError, match="No space left"):
        store.commit(folder, RunState(step=1))
    monkeypatch.undo()
    store.commit(folder, RunState(step=1))
    assert synced[-1] == folder.parent and newest(store)[0][1].step == 1


def cut(folder):
    file = folder / "policy" / "rank-0"
    file.write_bytes(file.read_bytes()[:50])


def change(folder):
    file = folder / "policy" / "rank-0"
    file.write_bytes(b"x" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut, "rank-0 has 50 bytes of 700"),
        (change, "rank-0 has changed"),
        (lambda folder: (folder / "policy" / "rank-0").unlink(), "rank-0 is missing"),
        (lambda folder: (folder / WHOLE).unlink(), WHOLE),
        (lambda folder: (folder / WHOLE).write_text('{"state'), WHOLE),
    ],
)
def test_a_damaged_one_is_passed_over_and_that_is_said(store, damage, said):
    write(store, 1)
    damage(write(store, 2))
    (folder, state), heard = newest(store)
    assert state.step == 1
    assert len(heard) == 1 and said in heard[0] and "step-000002" in heard[0]


def test_a_writing_that_never_ended_does_not_count(store):
    write(store, 1)
    (store.begin(2) / "policy").mkdir()
    assert newest(store)[0][1].step == 1


def test_nothing_whole_is_nothing(store):
    store.claim(resume=False)
    assert newest(store) == (None, [])


def test_an_earlier_run_is_moved_aside_never_overwritten(store):
    assert store.claim(resume=False) is None
    (store._dir / "metrics.jsonl").write_text("precious")
    aside = store.claim(resume=False)
    assert (aside / "metrics.jsonl").read_text() == "precious" and not any(store._dir.iterdir())
    (store._dir / "metrics.jsonl").write_text("also")
    assert store.claim(resume=True) is None
    assert (store._dir / "metrics.jsonl").read_text() == "also"
