"""The bodies that SGLang's server takes and the replies it gives, in 0.5.16 and in 0.5.23, and nothing else.

Of log-probabilities: ``output_token_logprobs`` are of the softmax of logits / temperature over the whole vocabulary,
and of temperature 1 where a request is greedy (``layers/sampler.py``; with SGLANG_RETURN_ORIGINAL_LOGPROB in the
server's environment, always of temperature 1: leave that unset). Where top-k or top-p cut the vocabulary those are not
of the distribution sampled from; ``return_sampling_mask`` then brings ``output_token_sampling_logprobs``, which are.
SGLang takes top-p of the whole mass, not of what top-k leaves. 0.5.23 wants a top-k with every mask, since it sends the
tokens that could have been drawn along, up to ``sampling_mask_max_tokens`` of them.

Seeds are sent, but count only in a server with ``enable_deterministic_inference``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..protocols import Completion, EngineError, Request

MOST_TRIES = 4  # of one request; numbers its names at the server, so less than 10
RECEIVE = "miles_core.edges.sglang.receive.receive"  # the server's custom_weight_loader, which it imports by this name


@dataclass(frozen=True, slots=True)
class Tensors:
    """Weights for the server: one payload for each of its tensor-parallel ranks.

    Each is base64 of what SGLang's ``MultiprocessingSerializer`` gives: handles, not bytes, where the tensors are on a
    GPU. ``load_format`` "flattened_bucket" for one flat tensor with its metadata, which the server opens in the
    sender's memory; RECEIVE for what tells it of buckets that are broadcast in a group that it was told to join.
    """

    serialized: tuple[str, ...]
    load_format: str


class Stranger(EngineError):
    """A server answered that is not the one asked: its port went to another."""


def update(bucket: Tensors, named: str, flush: bool = False) -> tuple[str, dict[str, Any]]:
    """Path and body that load a bucket. Once it is loaded the weights are called what is ``named``; see ``stamp``.
    ``flush`` the cache with it: once an update, while the server stands still.

    That keeps the memory in which buckets arrive, which ``/flush_cache`` would give back to the driver. 0.5.16 ends
    itself where a request is in flight, later ones decline.
    """
    body: dict[str, Any] = {"serialized_named_tensors": list(bucket.serialized), "load_format": bucket.load_format}
    if bucket.load_format == RECEIVE:  # once: what was broadcast has come, and a draft model would wait for it again
        body |= {"selector": "target", "disable_draft_model": True}  # 0.5.23 knows the first, 0.5.16 the second
    return "/update_weights_from_tensor", body | {"flush_cache": flush, "weight_version": named}


def stamp(version: int, mark: str) -> str:
    """What a server calls its weights: their version, and a mark that no other server has.

    Every completion brings it back, and so proves which server wrote it.
    """
    return f"{version}@{mark}"


def version_of(stamped: Any, mark: str) -> int:
    """Raises Stranger unless ``stamped`` was given by ``stamp`` with this mark."""
    version, _, found = str(stamped).partition("@")
    if found != mark or not version.isdecimal():
        raise Stranger(f"a server answered with weights {stamped!r}; those of ours end in @{mark}")
    return int(version)


def address(url: str, mark: str) -> str:
    return f"{url}#{mark}"


def parts_of(address: str) -> tuple[str, str]:
    """The url and the mark of an ``address``."""
    url, _, mark = address.partition("#")
    return url, mark


def rid(id: str, attempt: int) -> str:
    """What a request is called at the server, where no two may have the same name; ``attempt`` is below MOST_TRIES.

    The server aborts whatever *begins* with the name it is given. With a digit behind it "1/1" does not begin "1/10".
    """
    return f"{id}.{attempt}"


def generate(requests: list[Request], rids: list[str], caches: list[str] | None = None) -> dict[str, Any]:
    """The body that samples ``requests``; the reply is a list in their order, once all of them are done.

    ``caches``: what each shares keys and values with, those that are called the same; left out, with all.
    """
    own = {"extra_key": caches} if caches else {}
    return own | {
        "rid": rids,
        "input_ids": [request.tokens for request in requests],
        "sampling_params": [_sampling(request) for request in requests],
        "return_logprob": True,
        "return_sampling_mask": [_filtered(request) for request in requests],
    }


def _sampling(request: Request) -> dict[str, Any]:
    asked = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k or -1,  # 0 is refused
        "sampling_seed": request.seed % 2**63,
    }
    if asked.stop_tokens:
        return params | {"stop_token_ids": list(asked.stop_tokens)}
    return params | {"ignore_eos": True}  # not with stop tokens: they would be ignored too


def _filtered(request: Request) -> bool:
    asked = request.sampling
    return asked.temperature > 0 and (asked.top_p < 1.0 or asked.top_k > 0)


def completion(request: Request, reply: dict[str, Any], mark: str) -> Completion:
    """What the server says of one request. Raises Stranger, or EngineError where it lacks what it must have."""
    meta = reply["meta_info"]
    version_of(meta["weight_version"], mark)
    tokens, finish = list(reply["output_ids"]), meta["finish_reason"]["type"]
    if finish not in ("stop", "length", "abort"):
        raise EngineError(f"request {request.id}: finished with {finish!r}")
    if _filtered(request):
        logprobs = meta.get("output_token_sampling_logprobs") or []
    else:
        logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or []]
    if finish == "abort":
        tokens = tokens[: len(logprobs)]  # a request aborted while it waits for its turn may lack the last ones
    if len(logprobs) < len(tokens):
        raise EngineError(f"request {request.id}: {len(tokens)} tokens but {len(logprobs)} log-probabilities")
    if None in (logprobs := logprobs[: len(tokens)]):  # JSON has no infinity, and no NaN
        raise EngineError(
            f"request {request.id}: the model's logits are not finite; weights version {meta['weight_version']}"
        )
    return Completion(tokens, logprobs, _versions(meta, len(tokens), mark), finish)


def _versions(meta: dict[str, Any], n: int, mark: str) -> list[int]:
    """Per token. 0.5.23 tells which weights wrote which tokens; with 0.5.16 no request outlives an update."""
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": n}]
    versions: list[int] = []
    for span in spans:
        versions += [version_of(span["version"], mark)] * (span["end"] - span["start"])
    if len(versions) < n:
        raise EngineError(f"the server gave versions of {len(versions)} tokens for {n}")
    return versions[:n]
