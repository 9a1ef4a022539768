"""What the core chapter's page should not carry: full disks, kills, two processes, damaged records."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmbook.core import (
    CorruptFileError, Meter, ResourceError, Run, SettingsError, Stage, Table, atomic_write, code_version, find_settings,
    read_json, read_settings, seal, verify, write_json,
)


@dataclass(frozen=True)
class Nothing:
    "No settings."


@dataclass(frozen=True)
class Dial:
    "One number."

    turns: int = 1  # how many


def test_a_full_disk_leaves_what_stood_there(tmp_path, monkeypatch):
    write_json(tmp_path / "record.json", {"old": True})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_json(tmp_path / "record.json", {"new": True})
    assert read_json(tmp_path / "record.json") == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_other_errors_of_the_disk_are_not_renamed(tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises((NotADirectoryError, FileExistsError)), atomic_write(tmp_path / "file" / "x") as stream:
        stream.write(b"")


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "record.json"
    write_json(target, {"old": True})
    code = (
        "import sys, time; from llmbook.core import atomic_write\n"
        "with atomic_write(sys.argv[1], 'w') as stream:\n"
        "    stream.write('half'); stream.flush(); print('writing', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert read_json(target) == {"old": True}


@pytest.mark.parametrize("damage", ["shorten", "flip", "remove", "forget"])
def test_every_damage_is_found(tmp_path, damage):
    (tmp_path / "weights.bin").write_bytes(bytes(range(200)))
    seal(tmp_path)
    target = tmp_path / "weights.bin"
    if damage == "shorten":
        target.write_bytes(target.read_bytes()[:-1])
    elif damage == "flip":
        target.write_bytes(b"\x01" + target.read_bytes()[1:])
    elif damage == "remove":
        target.unlink()
    else:
        (tmp_path / "checksums.json").unlink()
    with pytest.raises(CorruptFileError):
        verify(tmp_path)


def test_two_processes_do_not_work_in_one_run(tmp_path):
    def slow(settings, inputs, output):
        with pytest.raises(ResourceError, match="another process"):
            Run(tmp_path / "run", [], {}).execute()
        return {}

    Run(tmp_path / "run", [Stage("slow", slow, Nothing)], {"slow": Nothing()}).execute()


def test_a_failed_stage_keeps_what_it_wrote_for_the_next_try(tmp_path):
    def climb(settings, inputs, output):
        if not (output / "half").exists():
            (output / "half").write_text("kept")
            raise RuntimeError("killed")
        return {"found": (output / "half").read_text()}

    run = Run(tmp_path / "run", [Stage("climb", climb, Nothing)], {"climb": Nothing()})
    with pytest.raises(RuntimeError):
        run.execute()
    assert run.record("climb") is None
    run.execute()
    assert run.record("climb")["numbers"] == {"found": "kept"}


def test_a_changed_setting_starts_from_an_empty_folder(tmp_path):
    def climb(settings, inputs, output):
        assert not (output / "half").exists()
        (output / "half").write_text(str(settings.turns))
        if settings.turns == 1:
            raise RuntimeError("killed")
        return {}

    for turns in (1, 2):
        run = Run(tmp_path / "run", [Stage("climb", climb, Dial)], {"climb": Dial(turns)})
        if turns == 1:
            with pytest.raises(RuntimeError):
                run.execute()
    run.execute()
    assert (run.path("climb") / "half").read_text() == "2"
    assert not list(run.folder.glob("*.partial-*"))


def test_what_lies_outside_decides_too(tmp_path):
    world, counted = {"version": 1}, []

    def look(settings, inputs, output):
        counted.append(world["version"])
        return {}

    stage = Stage("look", look, Nothing, outside=lambda _: dict(world))
    run = Run(tmp_path / "run", [stage], {"look": Nothing()})
    run.execute()
    run.execute()
    world["version"] = 2
    run.execute()
    assert counted == [1, 2]


def test_a_corrupt_input_stops_the_stage_that_reads_it(tmp_path):
    def make(settings, inputs, output):
        (output / "a.txt").write_text("right")
        return {}

    stages = [Stage("make", make, Nothing), Stage("read", lambda *_: {}, Nothing, ("make",))]
    run = Run(tmp_path / "run", stages, {"make": Nothing(), "read": Nothing()})
    run.execute(["make"])
    (run.path("make") / "a.txt").write_text("wrong")  # of equal length: only the full check sees it
    with pytest.raises(CorruptFileError, match="a.txt"):
        run.execute()


def test_code_of_imported_chapters_counts():
    from llmbook.positions import sinusoidal_positions

    assert code_version(sinusoidal_positions) != code_version(seal)


@pytest.mark.parametrize("text, words", [
    ("[a]\ndial.turns = 1\ndial.turns = 2\n", "already exists"),
    ("dial.turns = 1\n", "no section"),
    ("[a]\ndial.turns = many\n", "a whole number"),
    ("[a]\ndail.turns = 1\n", "dial.turns"),
])
def test_bad_settings_files(tmp_path, text, words):
    (tmp_path / "s.ini").write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_settings({"dial": Dial}, "a", tmp_path / "s.ini", environment={})


def test_settings_come_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_settings().read_text() == (Path(__file__).parent.parent / "settings.ini").read_text()


def test_the_meter_counts_children():
    with Meter() as meter:
        subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)
        time.sleep(0.05)
    assert meter.cpu_seconds > 0.05 and meter.seconds >= 0.05


def test_tables_escape_html():
    assert "<b>" not in Table([{"a": "<b>"}])._repr_html_()
