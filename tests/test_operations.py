"""Versions survive kills and crowds; MLflow lists what was registered; a rehearsal finds what is broken."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmbook import operations
from llmbook.core import CorruptFileError, InputError, PolicyError, Run, Stage, read_json, seal, verify, write_json
from llmbook.operations import RegistrySettings, RehearsalSettings, find_objections, register, summarise_latency
from llmbook.registry import Registry, draw_lineage, lineage, reproduce
from llmbook.tracking import MlflowTracker, create_database, flatten_numbers, track_records
from sample_run import make_sample_run


def folder_of(path: Path, text: str = "one", sealed: bool = True) -> Path:
    """A folder with two files."""
    (path / "deep").mkdir(parents=True, exist_ok=True)
    (path / "a.txt").write_text(text)
    (path / "deep" / "b.txt").write_text(text * 3)
    if sealed:
        seal(path)
    return path


# --- the registry


def test_same_content_is_one_version(tmp_path):
    registry = Registry(tmp_path / "registry")
    first = registry.add("model", "m", folder_of(tmp_path / "a"))
    again = registry.add("model", "m", folder_of(tmp_path / "b"))
    other = registry.add("model", "m", folder_of(tmp_path / "c", "two"))
    assert (first.number, again.number, other.number) == (1, 1, 2)
    assert len(list((tmp_path / "registry" / "objects").iterdir())) == 2
    assert registry.names() == [("model", "m")]


def test_objects_are_links_and_copies_on_demand(tmp_path):
    source = folder_of(tmp_path / "a")
    for copies, links in ((False, 2), (True, 1)):
        registry = Registry(tmp_path / str(copies), copies)
        folder = registry.open_version(registry.add("model", "m", source))
        assert (folder / "a.txt").stat().st_nlink == links
        source = folder_of(tmp_path / f"again-{copies}")


def test_object_outlives_its_source(tmp_path):
    import shutil

    registry = Registry(tmp_path / "registry")
    version = registry.add("data", "d", folder_of(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    assert (registry.open_version(version) / "deep" / "b.txt").read_text() == "oneoneone"


def test_a_foreign_folder_is_left_as_it_was(tmp_path):
    source = folder_of(tmp_path / "a", sealed=False)
    version = Registry(tmp_path / "registry").add("adapter", "lora", source)
    assert sorted(p.name for p in source.iterdir()) == ["a.txt", "deep"]
    assert version.content == seal(folder_of(tmp_path / "b", sealed=False))


def test_damaged_source_and_damaged_object_are_refused(tmp_path):
    registry = Registry(tmp_path / "registry", copies=True)
    bad = folder_of(tmp_path / "bad")
    (bad / "a.txt").write_text("eno")
    with pytest.raises(CorruptFileError, match="a.txt` is changed"):
        registry.add("model", "m", bad)
    assert registry.versions("model", "m") == []
    version = registry.add("model", "m", folder_of(tmp_path / "good"))
    (registry.place(version.content) / "a.txt").write_text("eno")
    for act in (
        registry.open_version,
        lambda v: registry.promote(v, []),
        lambda v: registry.add("model", "m", tmp_path / "good"),
    ):
        with pytest.raises(CorruptFileError):
            act(version)
    assert registry.versions("model", "m")[0].status == "none"


def test_bad_names_and_kinds(tmp_path):
    registry, source = Registry(tmp_path / "registry"), folder_of(tmp_path / "a")
    for kind, name in (("models", "m"), ("model", "../m"), ("model", "M"), ("model", ""), ("model", "a/b")):
        with pytest.raises(InputError):
            registry.add(kind, name, source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing to store"):
        registry.add("model", "m", tmp_path / "empty")
    assert not (tmp_path / "registry" / "objects").exists()


def test_promotion_and_the_way_back(tmp_path):
    registry = Registry(tmp_path / "registry")
    one, two, three = (registry.add("model", "m", folder_of(tmp_path / t, t)) for t in ("one", "two", "three"))
    for version in (one, two, three):
        registry.promote(version, [])
    registry.promote(three, [])  # twice is once
    assert [v.status for v in registry.versions("model", "m")] == ["archived", "archived", "production"]
    assert registry.roll_back("model", "m").number == 2
    assert registry.roll_back("model", "m").number == 1
    with pytest.raises(PolicyError, match="no earlier"):
        registry.roll_back("model", "m")
    with pytest.raises(PolicyError, match="too slow; too big"):
        registry.promote(two, ["too slow", "too big"])
    assert registry.find("model", "m").number == 1


def test_no_way_back_to_a_lost_object(tmp_path):
    registry = Registry(tmp_path / "registry")
    one, two = (registry.add("model", "m", folder_of(tmp_path / t, t)) for t in ("one", "two"))
    registry.promote(one, []), registry.promote(two, [])
    (registry.place(one.content) / "a.txt").unlink()
    with pytest.raises(CorruptFileError):
        registry.roll_back("model", "m")
    assert registry.find("model", "m").number == 2, "production stays what it was"


KILLED = 77
CALLS = ("os.replace", "os.link", "os.fsync", "os.mkdir", "os.unlink")


def killed_at(count: int, work) -> bool:
    """Run work in a child that dies before its n-th call that changes the disk; whether it died."""
    child = os.fork()
    if child == 0:
        left = [count]

        def deadly(real):
            def call(*arguments, **named):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(KILLED)
                return real(*arguments, **named)

            return call

        for name in CALLS:
            attribute = name.split(".")[1]
            setattr(os, attribute, deadly(getattr(os, attribute)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


def test_killed_between_any_two_steps(tmp_path):
    source, newer = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", "two")
    for step in range(200):
        place = tmp_path / f"registry-{step}"
        registry = Registry(place)
        registry.promote(registry.add("model", "m", source), [])

        def work(place=place):
            fresh = Registry(place)
            fresh.promote(fresh.add("model", "m", newer), [])
            fresh.roll_back("model", "m")

        died = killed_at(step, work)
        versions = registry.versions("model", "m")
        assert sum(v.status == "production" for v in versions) == 1, f"step {step}"
        assert all(verify(registry.open_version(v)) == v.content for v in versions)
        again = registry.add("model", "m", newer)
        assert registry.promote(again, []).status == "production" and again.number == 2
        assert registry.roll_back("model", "m").number == 1
        if not died:
            break
    assert step > 10, "the kills came at many places"


def test_many_writers_lose_nothing(tmp_path):
    sources = [folder_of(tmp_path / f"s{i}", f"text {i}") for i in range(8)]
    children = []
    for half in (sources[:5], sources[3:]):
        if (child := os.fork()) == 0:
            for source in half:
                Registry(tmp_path / "registry").add("model", "m", source)
            os._exit(0)
        children.append(child)
    threads = [
        threading.Thread(target=Registry(tmp_path / "registry").add, args=("model", "m", s)) for s in sources[2:6]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    versions = Registry(tmp_path / "registry").versions("model", "m")
    assert [v.number for v in versions] == list(range(1, 9))
    assert len({v.content for v in versions}) == 8


def test_lineage_in_any_order(tmp_path):
    records = {n: read_json(p / "stage.json") for n, p in make_sample_run(tmp_path / "run").items()}
    chat = records["chat"]["content"]
    family = lineage(dict(sorted(records.items())), chat)
    assert list(family) == ["corpus", "tokenizer", "tokens", "model", "chat"]
    shuffled = dict(sorted(records.items(), reverse=True))
    assert draw_lineage(shuffled).svg.count("<text") >= 2 * len(records)


@dataclass(frozen=True)
class DrawSettings:
    seed: int = 0  # of the draws
    names: tuple[str, ...] = ("a", "b")  # one file each


def draw_numbers(settings, inputs, output):
    """Write numbers that depend on the seed."""
    import random

    chance = random.Random(settings.seed)
    for name in settings.names:
        (output / name).write_text(str(chance.random()))
    return {}


def draw_time(settings, inputs, output):
    """Write something else each time."""
    (output / "now").write_text(str(os.urandom(8)))
    return {}


def test_reproduce_finds_what_is_not_deterministic(tmp_path):
    stages = [Stage("draw", draw_numbers, DrawSettings), Stage("time", draw_time, DrawSettings, ("draw",))]
    run = Run(tmp_path / "run", stages, {s.name: DrawSettings(7) for s in stages})
    run.execute()
    records = {s.name: run.record(s.name) for s in stages}
    table = reproduce(records, stages, tmp_path / "again")
    assert {row["stage"]: row["same"] for row in table.rows} == {"draw": True, "time": False}
    records["draw"]["versions"]["python"] = "2.7"
    assert "python 2.7 →" in reproduce(records, stages, tmp_path / "again").caption


# --- tracking


def test_database_is_what_mlflow_would_make(tmp_path):
    import sqlite3

    create_database(tmp_path / "fast.db")
    before = (tmp_path / "fast.db").read_bytes()
    create_database(tmp_path / "fast.db")
    assert (tmp_path / "fast.db").read_bytes() == before, "an existing file is left alone"
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{tmp_path / 'slow.db'}").search_experiments()
    shape = {}
    for name in ("fast", "slow"):
        with sqlite3.connect(tmp_path / f"{name}.db") as connection:
            tables = [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]
            shape[name] = {
                t: sorted(row[1:] for row in connection.execute(f"pragma table_info('{t}')")) for t in tables
            }
            shape[name]["version"] = connection.execute("select * from alembic_version").fetchall()
            shape[name]["indexes"] = sorted(
                r[0] for r in connection.execute("select name from sqlite_master where type = 'index'")
            )
    assert shape["fast"] == shape["slow"]


def test_curves_of_every_form():
    numbers = {
        "curve": [{"step": 0, "loss": 1.0, "samples": ["x"]}, {"step": 5, "loss": 0.5, "bits": 2}, 3],
        "nan": float("nan"),
    }
    metrics, curves = flatten_numbers(numbers, "model")
    assert list(metrics) == ["model.nan"] and curves["model.curve.loss"] == [(0, 1.0), (5, 0.5)]


def test_long_curves_and_odd_names(tmp_path):
    tracker = MlflowTracker(tmp_path / "mlflow.db")
    curve = [{"step": i, "loss": float(i)} for i in range(1500)]
    record = {
        "settings": {f"s{i}": i for i in range(150)} | {"text": "x" * 9000},
        "numbers": {"ndcg@10": 0.5, "c": curve, "bad": float("nan")},
        "seconds": 1.0,
    }
    run = track_records(tracker, "long", {"model": record}, {"run": "long"})
    data = tracker.client.get_run(run).data
    assert data.metrics["model.ndcg_10"] == 0.5 and len(data.params) == 151
    assert len(tracker.client.get_metric_history(run, "model.c.loss")) == 1500


# --- the stage


def test_registered_run_is_listed_by_mlflow(tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "find_objections", lambda registry, release: [])
    inputs = make_sample_run(tmp_path / "runs" / "laptop")
    inputs.pop("version"), inputs.pop("service")
    out = tmp_path / "out"
    out.mkdir()
    first = register(RegistrySettings(), inputs, out)
    assert register(RegistrySettings(), inputs, out) == first, "started again, it lists nothing twice"
    assert first["status"] == "production" and first["parts"]["chat"] == "model/llmbook-chat 1"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'llmbook'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "laptop" and run.info.status == "FINISHED"
    assert run.data.params["corpus.source"] == "environment" and run.data.metrics["model.bits_per_byte"] == 2.21
    assert len(client.get_metric_history(run.info.run_id, "model.curve.bits_per_byte")) == 9
    version = client.get_model_version_by_alias("llmbook-chat", "production")
    content = read_json(inputs["chat"] / "stage.json")["content"]
    assert version.tags["content"] == content and verify(Path(version.source)) == content
    assert version.run_id == run.info.run_id


def test_a_worse_release_stays_outside(tmp_path, monkeypatch):
    inputs = make_sample_run(tmp_path / "runs" / "laptop")
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(operations, "find_objections", lambda registry, release: [])
    settings = RegistrySettings(database="off")
    good = register(settings, inputs, out)
    monkeypatch.setattr(operations, "find_objections", lambda registry, release: ["worse"])
    (inputs["chat"] / "made.txt").write_text("something worse")
    record = read_json(inputs["chat"] / "stage.json")
    write_json(inputs["chat"] / "stage.json", record | {"content": seal(inputs["chat"])})
    bad = register(settings, inputs, out)
    assert bad["status"] == "candidate" and bad["objections"] == ["worse"] and bad["release"] == "release/llmbook 2"
    registry = Registry(tmp_path / "runs" / "registry")
    assert str(registry.find("release", "llmbook")) == good["release"]


def test_the_gate_compares_only_the_same_texts(tmp_path):
    from llmbook import evaluation

    numbers = read_json(make_sample_run(tmp_path / "run")["evaluation"] / "stage.json")["numbers"]
    worse = {**numbers, "text": {"model": {"bits_per_byte": 9.0}}}
    release = lambda measured, corpus: SimpleNamespace(
        name="r", status="production", records={"evaluation": {"numbers": measured, "inputs": {"corpus": corpus}}}
    )
    registry = SimpleNamespace(versions=lambda kind, name: [release(numbers, "corpus 1")])
    assert not evaluation.find_breaches(evaluation.DEFAULT_GATE, numbers)
    assert any("bits_per_byte" in o for o in find_objections(registry, release(worse, "corpus 1")))
    assert find_objections(registry, release(worse, "corpus 2")) == []
    assert find_objections(registry, SimpleNamespace(name="r", records={})) == ["it was not evaluated"]


def test_a_release_promotes_only_with_whole_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "find_objections", lambda registry, release: [])
    inputs = make_sample_run(tmp_path / "runs" / "laptop")
    out = tmp_path / "out"
    out.mkdir()
    register(RegistrySettings(promote=False, database="off", copies=True), inputs, out)
    registry = Registry(tmp_path / "runs" / "registry")
    release = registry.find("release", "llmbook", 1)
    index = read_json(registry.open_version(release) / "release.json")["parts"]["index"]["content"]
    (registry.place(index) / "made.txt").unlink()
    with pytest.raises(CorruptFileError):
        registry.promote(release, [])


# --- the rehearsal


def test_rehearsal_without_parts_and_settings():
    with pytest.raises(ValueError, match="without a question"):
        RehearsalSettings(questions=(), from_index=0)
    assert summarise_latency([]) == {}
    rows = [{"kind": "chat", "seconds": s, "ttft_seconds": 1.0, "tokens_per_second": None} for s in (1.0, 3.0, 2.0)]
    assert summarise_latency(rows) == {"chat": {"seconds": 2.0, "ttft_seconds": 1.0}}


def test_rehearsal_of_a_service_that_only_embeds(tmp_path):
    import numpy

    from llmbook.protocol import Service

    service = Service(embed=lambda texts: numpy.ones((len(texts), 3), "f4"))
    exchanges, checks, metrics = operations.rehearse(service, RehearsalSettings(), tmp_path)
    assert [e["kind"] for e in exchanges] == ["embeddings"] and all(checks.values()), checks
    assert metrics and "keys.json" in {p.name for p in tmp_path.iterdir()}
    assert "lb-" not in (tmp_path / "keys.json").read_text()
