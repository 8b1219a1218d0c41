"""What the plugin says of a run before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from miles_core.config import RunConfig
from miles_core.edges.local import Local
from miles_core.edges.local.architecture import architecture, read_config


def plugin(folder: Path, config: dict[str, Any] | None = None, **keys: Any) -> Local:
    run = RunConfig.model_validate({"algorithm": "x", "model": {"path": str(folder)}} | keys)
    return Local(Local.Config.model_validate(config or {}), run)


def complaints(local: Local) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    local.miles_check(complain=lambda key, text: found.append((key, text)))
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama-biased"])
def test_a_model_it_serves_is_not_complained_of(tiny: Any, family: str) -> None:
    folder = tiny(family).folder
    assert complaints(plugin(folder)) == []
    arch, config = architecture(read_config(folder)), tiny(family).model.config
    assert (arch.vocab, arch.context, arch.kv_heads) == (61, 64, config.num_key_value_heads)
    assert arch.head_dim == getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; the local engine serves qwen2, qwen3, llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"vocab_size": "many"}, "lacks vocab_size"),
    ],
)
def test_a_model_it_cannot_serve(tiny: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((tiny("qwen3").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    [(key, text)] = complaints(plugin(tmp_path))
    assert key == "model.path" and message in text
    assert complaints(plugin(tmp_path, use={"engines": "sglang"})) == []  # then it is not this plugin's to judge
    assert plugin(tmp_path).miles_explain() == {}


def test_older_spelling_of_rotary_settings(tiny: Any) -> None:
    config = read_config(tiny("llama").folder)
    rope = config.pop("rope_parameters")
    older = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert architecture(older) == architecture(read_config(tiny("llama").folder))


def test_a_cache_too_small_for_one_sequence(tiny: Any) -> None:
    [(key, text)] = complaints(
        plugin(tiny("qwen3").folder, {"kv_mib": 1}, model={"path": str(tiny("qwen3").folder), "context": 4096})
    )
    assert key == "local.kv_mib" and "4096 tokens takes 2 MiB" in text


def test_processes_and_explanation(tiny: Any) -> None:
    local = plugin(tiny("qwen3").folder, {"max_batch": 4, "threads": 2}, placement={"engines": 2})
    engines = local.miles_engines()
    assert [(p.name, p.threads, p.cpus) for p in engines.processes] == [("engine-0", 2, 2.0), ("engine-1", 2, 2.0)]
    assert engines.processes[0].args == (str(tiny("qwen3").folder), None, 4, 1024, False)
    # 2 layers * 2 (keys, values) * 2 heads * 16 * 4 bytes = 512 bytes a token; 4 * 64 of them
    assert local.miles_explain() == {
        "engines": "2 local, each 4 sequences at once of up to 64 tokens, 0 MiB of KV cache"
    }
