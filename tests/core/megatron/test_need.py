"""What training takes of each GPU, before anything is built; ``layouts.py`` compares it with what is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from miles_core.config import RunConfig
from miles_core.edges import sharing
from miles_core.edges.megatron import Megatron, need
from miles_core.edges.megatron.hf import architecture, read
from miles_core.types import Role

CONFIG = {
    "model_type": "qwen3", "num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYER = 1024 * 64 * (16 + 2 * 8) + 1024 * 64 * 16 + 2 * 64 + 3 * 1024 * 3072 + 2 * 1024
ALL = 8 * LAYER + 1024 + 2 * 32000 * 1024
KEPT = 4 * 1024 + 64 * (3 * 16 + 3 * 8) + 3 * 3072  # values of a token in a layer
POLICY = {"policy": Role(trained=True)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture(autouse=True)
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_smallest", lambda: 0)


def run_of(model: Path, **placement: Any) -> RunConfig:
    tables = {"algorithm": "core", "model": {"path": model}, "batch": {"micro_tokens": 1000}}
    return RunConfig.model_validate(tables | {"placement": {"layout": "split", **placement}})


def planned(model: Path, table: dict[str, Any], trainers: int = 1, role: Role = POLICY["policy"]) -> need.Need:
    return need.planned(table, run_of(model, trainers=trainers), architecture(read(model)), role)


def test_a_model_is_divided_over_its_ranks(model: Path) -> None:
    kept = 1000 * 2 * 8 * KEPT
    assert planned(model, {}) == need.Need(2 * ALL, 4 * ALL, 4 * ALL, 8 * ALL, kept)
    assert planned(model, {}, 4) == need.Need(2 * ALL, 4 * ALL, ALL, 2 * ALL, kept)
    assert planned(model, {"use_distributed_optimizer": False}, 4) == planned(model, {})
    assert planned(model, {"bf16": False}) == need.Need(4 * ALL, 4 * ALL, 0, 8 * ALL, 2 * kept)
    assert planned(model, {"grad_reduce_in_bf16": True}).gradients == 2 * ALL
    half = planned(model, {"tensor_model_parallel_size": 2}, 2)
    assert half.optimizer == pytest.approx(8 * ALL, rel=1e-6)
    assert kept / 2 < half.activations < kept  # what the norms are given is there twice
    assert planned(model, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 2).activations == kept // 2
    stage = planned(model, {"pipeline_model_parallel_size": 2}, 2)
    assert stage.weights == 2 * (4 * LAYER + 1024 + 32000 * 1024) and stage.activations == kept // 2
    again = planned(model, {"recompute_granularity": "full"})
    assert again.activations == 1000 * 2 * (8 * 1024 + KEPT) and again.optimizer == 16 * ALL


def test_a_role_takes_what_it_needs(model: Path) -> None:
    assert planned(model, {}, role=Role()) == need.Need(2 * ALL)
    critic = planned(model, {}, role=Role(trained=True, head="value"))
    assert critic.weights == 2 * (ALL - 32000 * 1024)


def complaints(run: RunConfig, table: dict[str, Any] | None = None, **roles: Role) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    need.check(table or {}, run, POLICY | roles, lambda *complaint: found.append(complaint))
    return found


def test_a_plan_that_cannot_fit_is_refused_with_its_arithmetic(model: Path) -> None:
    [(key, message)] = complaints(run_of(model, gpu_gb=3.1))
    assert key == "placement.trainers"
    arithmetic = "policy 0.3 weights + 0.7 gradients + 0.7 fp32 weights + 1.3 Adam's moments + 0.3 activations = 3.3 GB"
    assert message.startswith(f"does not fit: {arithmetic}, on each GPU and at the least, of 3.1 GB. Raise it or")
    assert complaints(run_of(model, gpu_gb=3.5)) == []
    assert complaints(run_of(model, gpu_gb=3.1, trainers=2)) == []
    assert complaints(run_of(model, gpu_gb=3.1), {"recompute_granularity": "full"}) == []


def test_models_on_the_same_ranks_must_fit_together(model: Path) -> None:
    critic = Role(trained=True, head="value")
    [(_, message)] = complaints(run_of(model, gpu_gb=5), critic=critic, reference=Role())
    told = "; reference 0.3 GB of weights, together 6.0 GB, on each GPU"
    assert "; critic 0.3 weights + 0.5 gradients" in message and told in message
    assert complaints(run_of(model, gpu_gb=5, apart=["critic"]), critic=critic, reference=Role()) == []


def test_where_no_gpu_is_known_nothing_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaints(run_of(model)) == []
    said = need.explained({}, run_of(model), POLICY)
    assert said.endswith("= 3.3 GB, at the least, on each GPU of a size that placement.gpu_gb can tell")
    monkeypatch.setattr(sharing, "_smallest", lambda: 2 << 30)
    assert len(complaints(run_of(model))) == 1
    assert need.explained({}, run_of(model), POLICY).endswith("on each GPU of 2.1 GB")


def test_a_plan_tells_memory_and_the_bytes_of_an_update(model: Path) -> None:
    def told(**placement: Any) -> dict[str, str]:
        return Megatron(Megatron.Config(), run_of(model, **placement)).miles_explain(POLICY)

    assert told()["memory"] == need.explained({}, run_of(model), POLICY)
    assert told()["sync"] == f"{2 * ALL:,} bytes of weights to each engine, every time they are updated"
    assert "memory" not in told(layout="cpu") and told(layout="cpu")["sync"].startswith(f"{4 * ALL:,} bytes")
    assert "sync" not in told(engines=0)


@pytest.mark.parametrize(
    ("said", "size"), [("echo 81559; echo 143771", 81559 << 20), ("echo '[N/A]'", 0), ("exit 9", 0)]
)
def test_the_driver_tells_how_large_a_gpu_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, size: int
) -> None:
    monkeypatch.undo()
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{said}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert sharing._smallest.__wrapped__() == size
