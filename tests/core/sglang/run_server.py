"""``server.py`` for whole runs: it meets a trainer in a group of gloo and receives what is broadcast there.

Its model takes no notice of what arrives but for the order: two of the tensors stand for the two weights of
``sglang_model``, and count the updates that brought them. So an update of which a part is missing shows in its tokens.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from math import prod
from typing import Any

import server
import sglang_model
import torch
from server import NO_ROUTE, Server, told
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, TCPStore

VOCAB = 20  # of the quickstart's model
HELD = {"a": "model.embed_tokens.weight", "b": "model.norm.weight"}
MEET_S = timedelta(seconds=60)


def enter_group(
    backend: str, init_method: str, world_size: int, rank: int, group_name: str, timeout: timedelta = MEET_S
) -> ProcessGroup:
    """As SGLang's ``init_custom_process_group``: a group apart from the default one."""
    assert backend == "gloo"
    host, port = init_method.removeprefix("tcp://").split(":")
    store = TCPStore(host, int(port), world_size, rank == 0, timeout=timeout, wait_for_workers=False)
    group: ProcessGroup = ProcessGroupGloo(PrefixStore(group_name, store), rank, world_size, timeout)
    return group


class Receiver(Server):
    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.joined: dict[str, ProcessGroup] = {}

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/init_weights_update_group":
            where = f"tcp://{body['master_address']}:{body['master_port']}"
            place = body["world_size"], body["rank_offset"], body["group_name"]
            try:
                self.joined[place[2]] = await asyncio.to_thread(enter_group, body["backend"], where, *place)
            except RuntimeError as error:
                return told((False, f"Failed to initialize custom process group: {error}."))
        return await super().post(path, body)

    async def route(self, method: str, target: str, body: dict[str, Any] | None) -> Any:
        """Without checksums, which 0.5.16 has none of without a GPU: versions of weights are all that is known here."""
        return NO_ROUTE if target == "/weights_checker" else await super().route(method, target, body)

    async def update(self, path: str, body: dict[str, Any]) -> Any:
        assert path == "/update_weights_from_distributed"
        if self.sessions and self.scheduler.session is None:
            return 400, {"success": False, "message": "outside a session"}
        kinds = (getattr(torch, name) for name in body["dtypes"])
        size = sum(kind.itemsize * prod(shape) for kind, shape in zip(kinds, body["shapes"], strict=True))
        group, flat = self.joined[body["group_name"]], torch.empty(size, dtype=torch.uint8)
        try:
            await asyncio.to_thread(lambda: group.broadcast(flat, 0).wait())
        except RuntimeError as error:
            return told((False, f"Failed to update parameter online: {error}"))
        came = {name: self.scheduler.weights[name] + 1 for name, tensor in HELD.items() if tensor in body["names"]}
        return told(self.scheduler.load(came, body, None))


def serve(dialect: str) -> None:
    """What ``python -m sglang.launch_server`` does; of its arguments most are of no consequence here."""
    sglang_model.VOCAB = VOCAB
    args, _ = server.options().parse_known_args(["--dialect", dialect, "--step-s", "0.02", *sys.argv[1:]])
    asyncio.run(server.main(args, Receiver))
