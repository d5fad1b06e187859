"""What is kept on disk: whole, named by its content, made by one at a time."""

import os
import subprocess
import sys
import threading

import filelock
import pytest

from dfc_lib import paths, store


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    """A crash between opening and closing must leave either the old file or the new one."""
    target = tmp_path / "deep" / "file.txt"
    store.write_atomically(target, "one\n")
    assert target.read_bytes() == b"one\n"

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        store.write_atomically(target, "two")
    assert target.read_text() == "one\n"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_a_key_depends_on_values_and_not_on_the_order_of_names():
    """Two orders of the same settings must not be trained twice; other settings must be."""
    key = store.key({"steps": 60, "seed": 0}, ["A", "B"])
    assert key == store.key({"seed": 0, "steps": 60}, ["A", "B"])
    assert len(key) == 16
    others = [
        store.key({"seed": 1, "steps": 60}, ["A", "B"]),
        store.key({"seed": 0, "steps": 60}, ["B", "A"]),
        store.key({"seed": 0, "steps": 60}, ["A"], "B"),
    ]
    assert len({key, *others}) == 4


def test_a_lock_is_held_by_one_and_freed_when_its_holder_is_killed(tmp_path):
    """Two that train the same crosscoder would mix their files; a killed one must not block."""
    path = tmp_path / "deep" / "lock"
    code = (
        "import sys, time; from pathlib import Path; from dfc_lib import store\n"
        "with store.lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    line = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(line, cwd=paths.ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(filelock.Timeout), store.lock(path, wait=False):
            pass
        holder.kill()
    with store.lock(path, wait=False):
        pass


def test_a_lock_waits_for_its_turn_in_another_thread(tmp_path):
    """Trainings side by side in one process exclude each other as processes do."""
    order = []

    def second():
        with store.lock(tmp_path / "lock"):
            order.append("second")

    with store.lock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
