"""What the server does without its model: bytes go where the model would have put them, or it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miles_core.edges.sglang.bucket import Flat, buckets
from miles_core.edges.sglang.receive import Receiver, Sending, note
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

HIDDEN, INNER, VOCAB, PADDED, LAYERS, EXPERTS = 8, 12, 10, 16, 2, 3
ROWS = {"q_proj": (0, 16), "k_proj": (16, 20), "v_proj": (20, 24), "gate_proj": (0, INNER), "up_proj": (INNER, 24)}
Load = Callable[["Model", str, Tensor], None]


class Model(nn.Module):
    """Made as SGLang's are: fused, cut for the second of two ranks, and with a vocabulary that is padded."""

    def __init__(self, also: Load | None = None) -> None:
        super().__init__()
        self.asked, self.also = 0, also
        self.embed = empty(PADDED, HIDDEN)
        for i in range(LAYERS):
            layer = nn.Module()
            layer.qkv, layer.gate_up, layer.down = empty(24, HIDDEN), empty(24, HIDDEN), empty(HIDDEN, INNER // 2)
            layer.experts, layer.norm = empty(EXPERTS, 2, HIDDEN), empty(HIDDEN, dtype=torch.float32)
            self.add_module(f"layer{i}", layer)
        self.register_buffer("scale", torch.zeros(()))

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.asked += 1
        for name, tensor in weights:
            if self.also:
                self.also(self, name, tensor)
            place, _, kind = name.partition(".")
            if place == "embed":
                self.embed.data[:VOCAB].copy_(tensor)
                self.embed.data[VOCAB:].fill_(0)
            elif place == "scale":
                self.scale.copy_(tensor)
            else:
                self.put(self.get_submodule(place), kind, tensor)

    def put(self, layer: Any, kind: str, tensor: Tensor) -> None:
        if kind in ROWS:
            start, end = ROWS[kind]
            fused = layer.qkv if kind[0] in "qkv" else layer.gate_up
            fused.data.narrow(0, start, end - start).copy_(tensor)
        elif kind == "down":
            layer.down.data.copy_(tensor.narrow(1, INNER // 2, INNER // 2))
        elif kind == "norm":
            layer.norm.data.copy_(tensor)  # of another dtype
        else:
            layer.experts.data[int(kind[-1])].copy_(tensor.t())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 7.0, dtype=dtype))


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {"embed": torch.randn(VOCAB, HIDDEN), "scale": torch.randn(())}
    for i in range(LAYERS):
        rows = {kind: torch.randn(end - start, HIDDEN) for kind, (start, end) in ROWS.items()}
        experts = {f"expert{e}": torch.randn(HIDDEN, 2) for e in range(EXPERTS)}
        more = {"down": torch.randn(HIDDEN, INNER), "norm": torch.randn(HIDDEN), **experts}
        made |= {f"layer{i}.{kind}": tensor for kind, tensor in (rows | more).items()}
    return {name: tensor.bfloat16() for name, tensor in made.items()}


class Handed(Receiver):
    """Is handed what a sender would broadcast."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.sent: list[Tensor] = []
        self.updates = 0

    def update(self, model: nn.Module, tensors: dict[str, Tensor], bucket_bytes: int) -> None:
        self.updates += 1
        sending = Sending("some", "", 0, self.updates, bucket_bytes, 5.0)
        notes = []
        for bucket in buckets(iter(tensors.items()), (Flat(bucket_bytes), Flat(bucket_bytes))):
            self.sent.append(bucket.tensor.clone())
            notes.append(note(bucket.places).encode())

        def arrive() -> None:
            for number, told in enumerate([*notes, note([]).encode()]):
                self.take(None, sending, number, told)  # type: ignore[arg-type]

        thread = threading.Thread(target=arrive, daemon=True)
        thread.start()
        self.load(model, sending)
        thread.join(5)
        assert not self.sent

    def _receive(self, group: Any, flat: Tensor) -> None:
        flat.copy_(self.sent.pop(0))


@pytest.fixture
def receiver() -> Handed:
    return Handed()


def right(model: Model, tensors: dict[str, Tensor]) -> bool:
    """Whether all is as a model of its own would have loaded it, in one go."""
    other = Model()
    other.load_weights(tensors.items())
    return all(mine.equal(theirs) for mine, theirs in zip(model.state_dict().values(), other.state_dict().values()))  # noqa: B905


def spoil(model: nn.Module) -> None:
    """As SGLang does to find out whether weights arrive."""
    for tensor in model.state_dict().values():
        tensor.fill_(3.0)


@settings(max_examples=20, deadline=None)
@given(bucket_bytes=st.integers(60, 4000), order=st.randoms(use_true_random=False))
def test_a_model_is_asked_once(bucket_bytes: int, order: Any) -> None:
    """Wherever buckets end, whichever tensors are larger than one, and in any order."""
    receiver, model = Handed(), Model()
    names = list(weights(0))
    order.shuffle(names)
    for version in range(4):
        spoil(model)
        made = weights(version)
        receiver.update(model, {name: made[name] for name in names}, bucket_bytes)
        assert right(model, made) and model.asked == 1


def test_of_what_is_larger_than_a_bucket_no_memory_is_kept(receiver: Handed) -> None:
    receive, storages, most = receiver._receive, [], 0

    def alive() -> int:
        return sum(not storage.expired() for storage in storages)

    def seen(group: Any, flat: Tensor) -> None:
        nonlocal most
        if len(flat) > 100:
            storages.append(StorageWeakRef(flat.untyped_storage()))
            most = max(most, alive())
        receive(group, flat)

    model = Model()
    receiver._receive = seen  # type: ignore[method-assign]
    for version in range(3):
        receiver.update(model, weights(version), 100)
        assert not alive()
    assert right(model, weights(2)) and model.asked == 1
    assert len(storages) > 6 and most <= 2


def test_other_buckets_are_not_taken_for_known_ones(receiver: Handed) -> None:
    model, asked = Model(), []
    for version, turned in enumerate((0, 0, 1, 1, 0)):
        spoil(model)
        made = list(weights(version).items())
        receiver.update(model, dict(made[turned:] + made[:turned]), 400)
        assert right(model, weights(version))
        asked.append(model.asked)
    assert asked == [1, 1, 2, 2, 2]


def test_what_is_not_known_yet_is_asked_for_from_there_on(receiver: Handed) -> None:
    model, made = Model(), weights(0)
    first = dict(list(made.items())[:12])
    receiver.update(model, first, 400)
    receiver.update(model, made, 400)
    assert right(model, made) and model.asked == 2
    spoil(model)
    receiver.update(model, made, 400)
    assert right(model, made) and model.asked == 2


def moved(model: Model) -> None:
    model.embed.data = model.embed.data.clone()


def replaced(model: Model) -> None:
    model.get_submodule("layer1").down = empty(HIDDEN, INNER // 2)  # type: ignore[assignment]


def exchanged(model: Model) -> None:
    model.layer0, model.layer1 = model.layer1, model.layer0  # type: ignore[has-type]


@pytest.mark.parametrize("change", [moved, replaced, exchanged])
def test_it_is_asked_again_once_a_parameter_is_elsewhere(receiver: Handed, change: Callable[[Model], None]) -> None:
    model, kept = Model(), []
    for version in range(4):
        if version == 2:
            kept.append(dict(model.named_parameters()))  # so that nothing new comes to where they were
            change(model)
        spoil(model)
        receiver.update(model, weights(version), 400)
        assert right(model, weights(version))
    assert model.asked == 2


def test_a_parameter_that_moves_while_it_is_loaded_makes_nothing_known(receiver: Handed) -> None:
    spare = [torch.zeros(PADDED, HIDDEN, dtype=torch.bfloat16)]

    def swap(model: Model, name: str, tensor: Tensor) -> None:
        if name == "layer1.norm":  # behind the embedding
            spare[:], model.embed.data = [model.embed.data], spare[0]

    model = Model(swap)
    for version in range(3):
        receiver.update(model, weights(version), 400)
        assert model.asked == version + 1
    assert not receiver._copies.other


def elsewhere(name: str) -> Callable[[Callable[[Model, Tensor], Any]], Load]:
    def with_(do: Callable[[Model, Tensor], Any]) -> Load:
        return lambda model, at, tensor: do(model, tensor) if at == name else None

    return with_


OTHERS: dict[str, Load] = {
    "aten.mul": elsewhere("layer0.norm")(lambda model, tensor: model.scale.mul_(2)),
    "aten.clone": elsewhere("layer0.norm")(lambda model, tensor: tensor.clone()),
    "aten._local_scalar_dense": elsewhere("scale")(lambda model, tensor: tensor.item()),
    "aten._to_copy": elsewhere("layer0.down")(lambda model, tensor: tensor.float()),
    "aten._foreach_copy_": elsewhere("layer0.norm")(
        lambda model, tensor: torch._foreach_copy_([model.layer1.norm.data], [tensor])
    ),
    "a copy from elsewhere": elsewhere("layer1.norm")(lambda model, tensor: model.scale.copy_(model.layer0.norm[0])),
    "no part of a parameter": elsewhere("embed")(lambda model, tensor: tensor.copy_(tensor)),
    "of another shape": elsewhere("scale")(lambda model, tensor: model.layer0.norm.data.copy_(tensor)),
    "filled that is no part": elsewhere("layer0.up_proj")(lambda model, tensor: tensor[:0].fill_(1)),
    "copied twice": elsewhere("layer0.norm")(lambda model, tensor: model.layer0.norm.data.copy_(tensor)),
}


@pytest.mark.parametrize("why", OTHERS)
def test_a_model_that_does_more_than_copying_is_asked_each_time(
    receiver: Handed, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(OTHERS[why])
    with torch.no_grad():
        for version in range(3):
            receiver.update(model, weights(version), 400)
            assert model.asked == version + 1
    said = capsys.readouterr().out
    assert (
        why in said and said.startswith("weights: the model is asked to load them each time") and said.count("\n") == 1
    )


def test_copies_that_are_made_by_another_thread_are_missed(receiver: Handed) -> None:
    """Nothing is seen of them, so nothing would be copied."""

    class Threaded(Model):
        def put(self, layer: Any, kind: str, tensor: Tensor) -> None:
            if kind != "norm":
                return super().put(layer, kind, tensor)
            on = threading.Thread(target=super().put, args=(layer, kind, tensor))
            on.start()
            on.join()

    model = Threaded()
    for version in range(3):
        spoil(model)
        receiver.update(model, weights(version), 400)
        assert right(model, weights(version)) and model.asked == version + 1
    assert "nothing copied from layer0.norm" in receiver._copies.other


def test_what_it_does_behind_the_last_tensor_counts_too(receiver: Handed) -> None:
    class Derives(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            super().load_weights(weights)
            with torch.no_grad():
                self.scale.copy_(self.embed.sum())

    model = Derives()
    for version in range(3):
        receiver.update(model, weights(version), 400)
        assert model.asked == version + 1 and model.scale == model.embed.sum()


def test_a_second_copy_behind_the_last_tensor_is_one_too(receiver: Handed) -> None:
    class Again(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            *_, (_, last) = ((self.put(self.layer1, "norm", tensor), tensor) for name, tensor in weights)
            self.put(self.layer1, "norm", last)

    model, made = Again(), {"layer1.norm": weights(0)["layer1.norm"]}
    receiver.update(model, made, 400)
    assert receiver._copies.other == "something copied twice"


def test_a_known_bucket_is_given_up_with_its_buffer() -> None:
    """Buffers are of one group; what was found out about them is too."""
    model = Model()
    for version in range(2):
        receiver = Handed()
        receiver.update(model, weights(version), 400)
        assert right(model, weights(version)) and model.asked == version + 1
