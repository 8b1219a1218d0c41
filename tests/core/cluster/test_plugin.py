"""What the plugin says before anything is started."""

import socket

import pytest
from miles_core.config import ModelTable, PlacementTable, RunConfig
from miles_core.edges.cluster import Ray
from pydantic import ValidationError


def plugin(placement=None, **config):
    run = RunConfig(algorithm="x", model=ModelTable(path="."), placement=PlacementTable(**placement or {}))
    return Ray(Ray.Config(**config), run)


def complaints(**config):
    said = []
    plugin(**config).miles_check(complain=lambda key, what: said.append((key, what)))
    return said


def test_nothing_to_complain_of():
    assert complaints() == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert complaints(address=f"127.0.0.1:{server.getsockname()[1]}") == []


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "ray://head:10001", "head:99999", "a b:1", "::1:6379", ""]
)
def test_spelling_of_the_address(address):
    [(key, what)] = complaints(address=address)
    assert key == "ray.address" and "is no address" in what and '"host:port"' in what


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    [(key, what)] = complaints(address=f"127.0.0.1:{port}")
    assert key == "ray.address" and f"nobody answers at 127.0.0.1:{port}" in what and f"--port={port}" in what


def test_local_settings_beside_an_address():
    assert [key for key, _ in complaints(address="auto", cpus=4)] == ["ray.cpus"]


@pytest.mark.parametrize("bad", [{"cpus": 0}, {"object_store_mib": 10}, {"start_timeout_s": 0}, {"adress": "auto"}])
def test_bad_values(bad):
    with pytest.raises(ValidationError):
        plugin(**bad)


def test_explains_processes_and_warns_of_few_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    text = plugin({"trainers": 2}).miles_explain()["processes"]
    assert text.startswith("2 training ranks, 1 engine, 1 rollout worker, on a Ray started on this machine")
    assert "gives out 8 CPUs" in text and "warning: 4 processes take turns on 2 cores" in text
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert "warning" not in plugin().miles_explain()["processes"]
    assert "on the Ray at head:6379" in plugin(address="head:6379").miles_explain()["processes"]
