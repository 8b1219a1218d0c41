"""The device Megatron runs on. Without a GPU, a layer that lets its CUDA calls run on the CPU.

Megatron-core asks for "cuda" by name. On a machine without a GPU four substitutions, made once per process, send
those requests to the CPU; everything else, collectives included, is Megatron's own code.

1. ``torch.compile`` is the identity while Megatron is imported: its ``jit_fuser`` would call the C++ compiler at the
   first forward pass, and loading the compiler alone doubles the time of the import.
2. ``torch.cuda`` functions that have a meaning on a CPU: current device, synchronize, streams and events.
3. Random numbers: the generator of ``torch.cuda`` is the CPU's. Megatron's own setter does not fail without a GPU,
   it silently queues the new state for ever, so that every tracked stream of random numbers would be wrong.
4. A ``TorchFunctionMode`` that reads the device "cuda" as "cpu" in tensor factories, ``.to`` and ``.cuda``. Modes
   belong to a thread, so ``running`` turns it on around each use, in whichever thread that is.

``install`` ends with a check that each substitution took, because a newer Megatron may have moved what they replace.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}
_installed = False


class DeviceLayerError(RuntimeError):
    """A substitution of the CPU layer did not take, so numbers could be silently wrong."""


class Event(torch.cpu.Event):
    """Everything on a CPU has already happened when it is recorded."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


class Stream(torch.cpu.Stream):
    def __init__(self, *_args: Any, **_options: Any) -> None:
        super().__init__()

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def wait_event(self, _event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, _stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _is_cuda(device: Any) -> bool:
    return device.startswith("cuda") if isinstance(device, str) else getattr(device, "type", None) == "cuda"


class CudaAsCpu(TorchFunctionMode):
    """Reads the device "cuda" as "cpu", and lets a float tensor pass for a CUDA one where its type is compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            return func(args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and args[0].dtype in _TYPE_NAMES:
            return _TYPE_NAMES[args[0].dtype]
        return func(*args)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def import_megatron(module: str) -> Any:
    """Import a module of Megatron, or one built on it; without a GPU, with nothing in it compiled."""
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it describes every buffer and group otherwise
    root, compile_ = logging.getLogger(), torch.compile
    level, handlers = root.level, root.handlers[:]
    if not has_gpu():
        torch.compile = _identity  # type: ignore[assignment]
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime": there is none
    try:
        with warnings.catch_warnings(action="ignore"):  # that Transformer Engine and Apex are not installed
            return importlib.import_module(module)
    finally:
        torch.compile = compile_
        root.setLevel(level)  # importing its training script sets up logging for the whole process
        root.handlers[:] = handlers


def _identity(function: Any = None, **_options: Any) -> Any:
    return function if function is not None else _identity


@contextmanager
def running() -> Iterator[None]:
    """What Megatron runs inside of. Without a GPU, in this thread, "cuda" means the CPU."""
    if has_gpu():
        yield
    else:
        with CudaAsCpu():
            yield


def native() -> AbstractContextManager[None]:
    """Inside ``running``: call PyTorch directly, where no device is named. The layer costs 2 us a call."""
    context: AbstractContextManager[None] = nullcontext() if has_gpu() else torch._C.DisableTorchFunction()
    return context


def install() -> None:
    """Make Megatron run on this machine. Does nothing where there is a GPU, nor the second time.

    Raises DeviceLayerError when the installed Megatron does not call what the layer substitutes.
    """
    global _installed
    if _installed or has_gpu():
        return
    torch.set_num_threads(1)  # more threads than cores per process measured up to ten times slower
    import_megatron("megatron.training.arguments")
    _substitute_cuda()
    _substitute_random()
    self_check()
    _installed = True


def _substitute_cuda() -> None:
    cuda, main = torch.cuda, Stream()
    replace: dict[str, Callable[..., Any]] = {  # classes stay classes: other libraries name them in annotations
        "current_device": lambda: "cpu",
        "get_device_properties": lambda device=None: SimpleNamespace(major=99, minor=0),  # bound by no GPU's limits
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "Stream": Stream,
        "Event": Event,
        "stream": torch.cpu.stream,
        "current_stream": lambda device=None: main,
        "default_stream": lambda device=None: main,
    }
    for name, function in replace.items():
        setattr(cuda, name, function)
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]


def _substitute_random() -> None:
    replace: dict[str, Callable[..., Any]] = {
        "get_rng_state": lambda device="cuda": torch.random.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.random.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
    }
    for name, function in replace.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    random = import_megatron("megatron.core.tensor_parallel.random")
    if not hasattr(random, "_set_cuda_rng_state"):
        raise DeviceLayerError(_moved("megatron.core.tensor_parallel.random has no _set_cuda_rng_state"))
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.random.set_rng_state(state)
    # It warns when the CPU generator moves inside a fork of the GPU's; here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def self_check() -> None:
    """Raise DeviceLayerError unless every substitution works through Megatron's own code."""
    with running():
        _check_devices()
        _check_random()


def _check_devices() -> None:
    try:
        x = torch.zeros(2, device="cuda")
        made = (x, x.cuda(), x.to("cuda"), torch.empty(1, device=torch.device("cuda")))
    except (RuntimeError, AssertionError) as error:
        raise DeviceLayerError(_moved(f"a tensor asked for on 'cuda' is not made on the CPU: {error}")) from error
    if any(t.device != _CPU for t in made):
        raise DeviceLayerError(_moved("a tensor asked for on 'cuda' is not made on the CPU"))
    if x.type() != "torch.cuda.FloatTensor":
        raise DeviceLayerError(_moved(f"a float32 tensor calls itself {x.type()}"))
    if torch.device(torch.cuda.current_device()) != _CPU:
        raise DeviceLayerError(_moved("torch.cuda.current_device() is not the CPU"))
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()


def _check_random() -> None:
    """Forking a tracked stream must draw that stream's numbers, and leave the default stream as it was."""
    random = import_megatron("megatron.core.tensor_parallel.random")
    tracker, before = random.CudaRNGStatesTracker(), torch.random.get_rng_state()
    queued = len(torch.cuda._queued_calls)
    try:
        tracker.add("check", 20231)
        drawn = []
        for _ in range(2):
            with tracker.fork("check"):
                drawn.append(torch.rand(8))
        unchanged = torch.equal(before, torch.random.get_rng_state())
    except Exception as error:
        raise DeviceLayerError(_moved(f"its random-number tracker fails: {type(error).__name__}: {error}")) from error
    finally:
        torch.random.set_rng_state(before)
    expected = torch.rand(16, generator=torch.Generator().manual_seed(20231))
    if not torch.equal(torch.cat(drawn), expected) or not unchanged:
        raise DeviceLayerError(_moved("its random-number tracker does not set the CPU generator"))
    if len(torch.cuda._queued_calls) != queued:
        raise DeviceLayerError(_moved("it queues random-number states that are never applied"))


def _moved(what: str) -> str:
    from megatron.core import __version__

    return (
        f"megatron-core {__version__} cannot run without a GPU: {what}. Numbers would be silently wrong, so nothing "
        "was started; install the tested version, megatron-core 0.19.2."
    )
