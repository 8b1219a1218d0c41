"""``server.py`` for whole runs: it meets a trainer in a group of gloo, and has Miles' own loader receive what comes.

Its model takes no notice of what arrives but for the order: two of the tensors stand for the two weights of
``sglang_model``, and count the updates that brought them. So an update of which a part is missing shows in its tokens.
``/received`` tells a digest of each tensor.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import pickle
import sys
import traceback
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from typing import Any

import server
import sglang_model
import torch
import torch.distributed as dist
from server import NO_ROUTE, Server, told
from torch.distributed import PrefixStore, ProcessGroup
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world, rendezvous

VOCAB = 20  # of the quickstart's model
HELD = {"a": "model.embed_tokens.weight", "b": "model.norm.weight"}
MEET_S = timedelta(seconds=60)


def enter_group(
    backend: str, init_method: str, world_size: int, rank: int, group_name: str, timeout: timedelta = MEET_S
) -> ProcessGroup:
    """What SGLang's ``init_custom_process_group`` does, by the same functions: a group apart from the default one."""
    assert backend == "gloo"
    store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    store, kind = PrefixStore(group_name, store), Backend(backend)
    made: tuple[ProcessGroup, Any] = _new_process_group_helper(
        world_size, rank, [], kind, store, group_name=group_name, backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[made[0]] = {i: i for i in range(world_size)}
    return made[0]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


class Model(torch.nn.Module):
    """As a model of SGLang's: ``load_weights`` goes through named tensors once, and keeps none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, str] = {}
        self.calls: list[list[str]] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.calls.append([])
        for name, tensor in weights:
            if "strange" in name:
                raise KeyError(name)
            self.received[name] = digest(tensor)
            self.calls[-1].append(name)


class Receiver(Server):
    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.joined: dict[str, ProcessGroup] = {}
        self.model = Model()

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/init_weights_update_group":
            where = f"tcp://{body['master_address']}:{body['master_port']}"
            place = body["world_size"], body["rank_offset"], body["group_name"]
            try:
                self.joined[place[2]] = await asyncio.to_thread(enter_group, body["backend"], where, *place)
            except RuntimeError as error:
                return told((False, f"Failed to initialize custom process group: {error}."))
        if path == "/destroy_weights_update_group":
            dist.destroy_process_group(self.joined.pop(body["group_name"]))
        return await super().post(path, body)

    async def route(self, method: str, target: str, body: dict[str, Any] | None) -> Any:
        """Without checksums, which 0.5.16 has none of without a GPU: versions of weights are all that is known here."""
        if target == "/received":
            return 200, self.model.received
        return NO_ROUTE if target == "/weights_checker" else await super().route(method, target, body)

    async def arrived(self, body: dict[str, Any]) -> dict[str, int]:
        """An exception of a loader is one of the scheduler, which ends the server with all that it started."""
        [payload] = body["serialized_named_tensors"]
        named = [(name, tensor.to("cpu")) for name, tensor in pickle.loads(base64.b64decode(payload, validate=True))]
        assert body["load_format"] in self.args.custom_weight_loader
        module, _, function = body["load_format"].rpartition(".")
        try:
            await asyncio.to_thread(getattr(import_module(module), function), self.model, named)
        except Exception:
            print(f"Scheduler hit an exception: {traceback.format_exc()}", flush=True)
            os._exit(1)
        [*_, names] = self.model.calls
        return {name: self.scheduler.weights[name] + 1 for name, tensor in HELD.items() if tensor in names}


def serve(dialect: str) -> None:
    """What ``python -m sglang.launch_server`` does; of its arguments most are of no consequence here."""
    sglang_model.VOCAB = VOCAB
    args, _ = server.options().parse_known_args(["--dialect", dialect, "--step-s", "0.02", *sys.argv[1:]])
    asyncio.run(server.main(args, Receiver))


if __name__ == "__main__":
    serve(sys.argv.pop(1))
