"""Tests that need a GPU: ``python -m pytest -m gpu tests/gpu``. Nothing is fetched, so a host without network will do.

SGLang's arguments come from ``sglang.toml``, or from the file that ``--sglang`` names. Its server takes a minute to
start, so one serves all tests that do not end it.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sglang", metavar="FILE", help="a TOML file whose [sglang] table is given to every server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def sglang(pytestconfig: pytest.Config) -> Path:
    """The file with the arguments of every server that is started here."""
    pytest.importorskip("sglang", reason="needs SGLang; pip install 'miles-core[sglang]'", exc_type=ImportError)
    return Path(pytestconfig.getoption("--sglang", None) or HERE / "sglang.toml").absolute()


@pytest.fixture(scope="session")
def flags(sglang: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads(sglang.read_text())["sglang"]
    return table


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of 29M random parameters in bfloat16: head width and vocabulary such as larger ones have, few layers."""
    from gpu_cases import write_model

    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def alone() -> Iterator[None]:
    """This process as the only training rank."""
    import torch.distributed as dist
    from miles_core.edges.megatron import device

    device.install()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def te() -> None:
    pytest.importorskip(
        "transformer_engine.pytorch", reason="needs TransformerEngine for PyTorch", exc_type=ImportError
    )


@pytest.fixture
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture
def four_gpus() -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
