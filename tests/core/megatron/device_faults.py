"""The process of ``test_device.py``: the CPU layer checks itself, then each of its substitutions is taken away."""

import threading

import torch
from miles_core.edges.megatron import device

compile_, zeros = torch.compile, torch.zeros
device.install()
device.install()  # the second time is free
assert torch.compile is compile_ and torch.zeros is zeros and torch.get_num_threads() == 1

from megatron.core.tensor_parallel import random  # noqa: E402


def refused(what: str) -> None:
    try:
        device.self_check()
    except device.DeviceLayerError as error:
        assert what in str(error) and "megatron-core" in str(error), error
    else:
        raise AssertionError(f"not noticed: {what}")
    assert torch.equal(torch.random.get_rng_state(), state), "the check moved the random numbers"


def queue(state, device=-1, graph_safe=False) -> None:
    """What Megatron's own setter comes to without a GPU."""
    torch.cuda._queued_calls.append((lambda: None, []))


def without(owner, name: str, value, what: str) -> None:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    refused(what)
    setattr(owner, name, kept)
    device.self_check()


def missing(*_args, **_options):
    raise RuntimeError("Found no NVIDIA driver")


torch.manual_seed(5)
state = torch.random.get_rng_state()
device.self_check()
without(random, "_set_cuda_rng_state", queue, "does not set the CPU generator")
without(torch.cuda, "manual_seed", lambda seed: None, "does not set the CPU generator")
without(torch.cuda.random, "get_rng_state", missing, "its random-number tracker fails: RuntimeError: Found no")
without(torch.cuda, "current_device", lambda: 0, "current_device() is not the CPU")
without(device.CudaAsCpu, "__torch_function__", lambda s, f, t, a=(), k=None: f(*a, **k or {}), "a tensor asked for")
without(device, "_TYPE_NAMES", {}, "a float32 tensor calls itself torch.FloatTensor")

seen: list[str] = []


def elsewhere() -> None:
    """Modes belong to a thread: the layer must work in one that did not install it."""
    with device.running():
        device.self_check()
        with device.native():
            seen.append(torch.zeros(1).device.type)
        seen.append(torch.zeros(1, device="cuda").cuda().to("cuda").device.type)


thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
assert seen == ["cpu", "cpu"]
assert isinstance(torch.cuda.Stream, type) and isinstance(torch.cuda.Stream(), torch.cuda.Stream)
