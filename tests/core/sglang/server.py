"""Stands in for ``python -m sglang.launch_server`` on a machine without a GPU: the same routes, bodies and replies.

Read off the sources of SGLang 0.5.16 and 0.5.23 (``entrypoints/http_server.py``, ``managers/tokenizer_manager.py``,
``managers/scheduler.py``), with what surprises in them: which calls end the process, what is aborted when, and what a
paused server still does. ``sglang_model.py`` stands in for the model; it writes tokens that show what was wrong. Faults
come with options at the start, and through ``/fault`` later.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sglang_model import Declined, Request, Scheduler

NO_ROUTE = (404, {"detail": "Not Found"})


class Server:
    """The web server and what SGLang calls the tokenizer manager."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.sessions = args, args.dialect == "0.5.23"
        self.scheduler = Scheduler(self.sessions, args.step_s, args.max_running_requests)
        self.version, self.ready_at = args.weight_version, time.monotonic() + args.slow_s
        self.known: dict[str, Request] = {}  # rid_to_state
        self.paused, self.unpaused = False, asyncio.Condition()
        self.readers = 0  # requests that hold the model_update_lock
        self.faults: dict[str, Any] = {}
        self.calls: list[str] = []

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(self, body: dict[str, Any]) -> Any:
        if (left := self.faults.get("busy", 0)) > 0:
            self.faults["busy"] = left - 1
            return 503, {"object": "error", "message": "The request queue is full.", "type": "503", "code": 503}
        if "garbage" in self.faults:
            return 200, [{"text": "no such field"}]
        rids, prompts = body["rid"], body["input_ids"]
        assert len(rids) == len(prompts) == len(body["sampling_params"]) == len(body["return_sampling_mask"])
        if twice := [rid for rid in rids if rids.count(rid) > 1]:
            raise Declined(f"Duplicate request IDs detected within the request: {twice}")
        requests = []
        keys = body.get("extra_key") or [None] * len(rids)
        for rid, prompt, params, mask, key in zip(
            rids, prompts, body["sampling_params"], body["return_sampling_mask"], keys, strict=True
        ):
            if rid in self.known:
                raise Declined(f"Duplicate request ID detected: {rid}")
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.known[rid] = request = Request(rid, prompt, params, mask, done, key)
            requests.append(request)
        try:
            return 200, await self.answer(requests)
        finally:
            for request in requests:
                self.known.pop(request.rid, None)

    async def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        async with self.unpaused:
            await self.unpaused.wait_for(lambda: not self.paused)
        self.readers += 1
        try:
            for request in requests:  # one bad request ends the call, and those before it are computed for nobody
                request.verify(self.args.context_length)
                self.scheduler.waiting.append(request)
            await asyncio.gather(*(request.done for request in requests))
        finally:
            self.readers -= 1
        return [self.told(request) for request in requests]

    def told(self, request: Request) -> dict[str, Any]:
        meta: dict[str, Any] = {"id": request.rid, "finish_reason": request.finish, "weight_version": self.version}
        meta |= {"completion_tokens": len(request.seen), "prompt_tokens": len(request.prompt), "num_retractions": 0}
        meta["cached_tokens"] = request.found
        meta["output_token_logprobs"] = [[value, token, None] for token, value in request.seen]
        if "null" in self.faults and request.seen:
            meta["output_token_logprobs"][0][0] = None
        if request.mask and not request.unborn:  # an abort in the waiting queue tells none of these
            meta["output_token_sampling_mask"] = [[token] for token, _ in request.seen]
            meta["output_token_sampling_logprobs"] = [value / 2 for _, value in request.seen]
        if self.sessions:
            meta["weight_versions"] = request.spans(self.version)
            meta["weight_version"] = meta["weight_versions"][-1]["version"]
        return {"text": "", "output_ids": [token for token, _ in request.seen], "meta_info": meta}

    def abort_request(self, body: dict[str, Any]) -> Any:
        rid, everything = body.get("rid", ""), body.get("abort_all", False)
        if everything or rid in self.known:
            self.scheduler.abort(rid, everything)
        return 200, None

    async def pause(self, body: dict[str, Any]) -> Any:
        mode = body.get("mode", "abort")
        async with self.unpaused:
            self.paused = True
            if mode != "abort":
                self.scheduler.pause(mode)
            while mode == "abort":
                self.scheduler.abort("", True)
                if not self.readers:
                    break
                self.calls.append("an abort that looks again in a second")
                await asyncio.sleep(1.0)
        return 200, {"message": "Generation paused successfully.", "status": "ok"}

    async def go_on(self, body: dict[str, Any]) -> Any:
        if body.get("torch_empty_cache", True):
            print("emptied the cache of the allocator", flush=True)
        async with self.unpaused:
            self.paused = self.scheduler.paused = False
            self.unpaused.notify_all()
        return 200, {"message": "Generation continued successfully.", "status": "ok"}

    async def health(self) -> Any:
        if time.monotonic() < self.ready_at:
            return 503, None
        if "hang" in self.faults or self.paused:
            await asyncio.sleep(20)
            return 503, None
        return 200, None

    # -- weights -------------------------------------------------------------------------------------------------

    async def arrived(self, body: dict[str, Any]) -> dict[str, int]:
        """What is to be loaded; no handles here, but the values themselves."""
        weights = {}
        for payload in body["serialized_named_tensors"]:
            weights |= json.loads(base64.b64decode(payload, validate=True))
        return weights

    async def update(self, path: str, body: dict[str, Any]) -> Any:
        if self.sessions and self.scheduler.session is None:
            message = f"{path[1:]} must run between begin_weight_update() and end_weight_update()"
            return 400, {"success": False, "message": message}
        while not self.paused and self.readers:  # the writer's side of model_update_lock
            await asyncio.sleep(0.005)
        weights = await self.arrived(body)
        success, message = self.scheduler.load(weights, body, self.faults.pop("fail_load", None))
        named = body.get("weight_version")
        if success and named not in (None, self.version):
            if self.sessions:
                self.scheduler.note_version(self.version)
            self.version = named
        soft = "soft" in self.faults
        return 200 if success or soft else 400, {"success": success, "message": message}

    def set_version(self, body: dict[str, Any]) -> Any:
        if body.get("abort_all_requests", True):
            self.scheduler.abort("", True)
        if self.sessions:
            self.scheduler.note_version(self.version)
        self.version = body["new_version"]
        message = f"Weight version updated to {self.version}"
        return 200, {"success": True, "message": message, "new_version": self.version}

    def check(self, body: dict[str, Any]) -> Any:
        weights, action = self.scheduler.weights, body.get("action", "checksum")
        if "no_checksums" in self.faults:  # 0.5.16 without a GPU
            return 400, {"success": False, "message": "Torch not compiled with CUDA enabled"}
        if action == "reset_tensors":
            for name in weights:
                weights[name] = random.randrange(1 << 40, 1 << 60)
            return 200, {"success": True, "message": "Success."}
        assert action == "checksum"
        sums = {name: f"{value:016x}" for name, value in weights.items()}
        return 200, {"success": True, "message": "Success.", "ranks": [{"checksums": sums}]}

    # -- routes --------------------------------------------------------------------------------------------------

    async def route(self, method: str, target: str, body: dict[str, Any] | None) -> Any:
        url = urlsplit(target)
        path, scheduler = url.path, self.scheduler
        if path not in ("/calls", "/fault"):
            self.calls.append(path)
        if "hang" in self.faults and path not in ("/model_info", "/health", "/fault", "/calls", "/v1/loads"):
            await asyncio.sleep(3600)  # the web server alone answers these; the scheduler has the others
        match path:
            case "/health" | "/health_generate":
                return await self.health()
            case "/model_info":
                return 200, {"model_path": self.args.model_path, "weight_version": self.version}
            case "/server_info":
                told = {"weight": 2.0, "kvcache": self.args.cache_gib, "token_capacity": 1000}
                state = {"memory_usage": told} if self.args.cache_gib else {}
                return 200, {"version": self.args.dialect, "internal_states": [state]}
            case "/v1/loads":
                counts = {"num_running_reqs": len(scheduler.running), "num_waiting_reqs": len(scheduler.waiting)}
                return 200, {"version": self.args.dialect, "loads": [{"dp_rank": 0} | counts]}
            case "/flush_cache":
                return await self.flush(float(parse_qs(url.query).get("timeout", ["0"])[0]))
            case "/weights_checker":
                return self.check(body or {})
            case "/calls":
                return 200, self.calls
        if method != "POST":
            return 405, {"detail": "Method Not Allowed"}
        if body is None:  # every one of these takes a body, if an empty one
            return 400, {"object": "error", "message": "Field required", "type": "Bad Request", "code": 400}
        return await self.post(path, body)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        scheduler = self.scheduler
        match path:
            case "/generate":
                return await self.generate(body)
            case "/abort_request":
                return self.abort_request(body)
            case "/pause_generation":
                return await self.pause(body)
            case "/continue_generation":
                return await self.go_on(body)
            case "/update_weights_from_tensor":
                return await self.update(path, body)
            case "/update_weight_version":
                return self.set_version(body)
            case "/begin_weight_update" if self.sessions:
                return told(scheduler.begin())
            case "/end_weight_update" if self.sessions:
                return told(scheduler.end())
            case "/init_weights_update_group":
                scheduler.groups.add(body.get("group_name", "weight_update_group"))
                where = f"{body['master_address']}:{body['master_port']} {body['rank_offset']} of {body['world_size']}"
                print(f"joined at {where} by {body.get('backend', 'nccl')}", flush=True)
                return told((True, "Succeeded to initialize custom process group."))
            case "/destroy_weights_update_group":
                scheduler.groups.discard(body.get("group_name", "weight_update_group"))
                return told((True, "Succeeded to destroy custom process group."))
            case "/release_memory_occupation" | "/resume_memory_occupation":
                scheduler.memory(path.startswith("/release"), body.get("tags") or ["kv_cache", "weights", "cuda_graph"])
                return 200, None
            case "/fault":
                self.faults |= body
                scheduler.dies_at = body.get("die_at", scheduler.dies_at)
                scheduler.most = body.get("most", scheduler.most)
                return 200, None
        return NO_ROUTE

    async def flush(self, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        while not self.scheduler.idle() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if timeout and not self.scheduler.idle():
            return 400, "Timed out waiting for idle state."
        return (200, "Cache flushed.\n") if self.scheduler.flush() else (400, "Flush cache failed.\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: as many requests as come."""
        try:
            while line := await reader.readline():
                method, target, _ = line.decode().split()
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                try:
                    status, answer = await self.route(method, target, json.loads(content) if content else None)
                except Declined as error:
                    status, answer = 400, {"error": {"message": str(error)}}
                text = answer if isinstance(answer, str) else "" if answer is None else json.dumps(answer)
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(text.encode())}\r\n\r\n{text}".encode())
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def told(outcome: tuple[bool, str]) -> tuple[int, dict[str, Any]]:
    return 200 if outcome[0] else 400, {"success": outcome[0], "message": outcome[1]}


async def main(args: argparse.Namespace, kind: type[Server] = Server) -> None:
    if args.die:
        print("Traceback (most recent call last):\nRuntimeError: no kernel image is available", flush=True)
        sys.exit(1)
    subprocess.Popen(["sleep", "600"])  # stands for the scheduler: it must not outlive the server
    await asyncio.sleep(args.load_s)
    server = kind(args)
    try:
        listening = await asyncio.start_server(server.serve, args.host, args.port, limit=2**24)
    except OSError as error:
        print(f"ERROR:    [Errno {error.errno}] error while attempting to bind on address", flush=True)
        os.killpg(os.getpgrp(), signal.SIGKILL)
    print("The server is fired up and ready to roll!", flush=True)
    await asyncio.gather(listening.serve_forever(), server.scheduler.run())


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dialect", choices=["0.5.16", "0.5.23"], required=True)
    parser.add_argument("--die", action="store_true", help="while starting, with a traceback")
    parser.add_argument("--load-s", type=float, default=0.0, help="before it listens")
    parser.add_argument("--slow-s", type=float, default=0.0, help="listening, but not ready")
    parser.add_argument("--step-s", type=float, default=0.001, help="for a token of every running request")
    parser.add_argument("--max-running-requests", type=int, default=10000)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--cache-gib", type=float, default=0.0, help="told, with 2 GiB of weights")
    parser.add_argument("--custom-weight-loader", nargs="*", default=[])
    for option in ("--model-path", "--host", "--weight-version"):
        parser.add_argument(option, required=True)
    parser.add_argument("--port", type=int, required=True)
    return parser


if __name__ == "__main__":
    asyncio.run(main(options().parse_args()))
