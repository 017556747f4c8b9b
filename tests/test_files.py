"""Safe files: a checkpoint is complete or refused, and a failed write leaves the old file."""

import os
import pickle
import random
import resource
import signal
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.files import (
    is_intact,
    load_tensors,
    lock,
    remove,
    restore,
    save,
    save_tensors,
    trained_classes,
    write_atomically,
    write_text,
)
from tests.helpers import in_a_fork

STATE = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.float16),
    "step": 3,
    "history": [{"step": 1, "accuracy": None, "value": 0.5}],
    "name": "x",
}


def _refused(path, match: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_tensors(path)
    assert caught.value.code == 4
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def file(tmp_path):
    save_tensors(tmp_path / "run" / "a.pt", STATE)
    return tmp_path / "run" / "a.pt"


def test_round_trip_with_the_hash_beside(file):
    state = load_tensors(file)
    assert list(state) == list(STATE)
    assert torch.equal(state["weight"], STATE["weight"])
    assert state["half"].dtype == torch.float16
    for name in ("step", "history", "name"):
        assert state[name] == STATE[name]
    assert {p.name for p in file.parent.iterdir()} == {"a.pt", "a.pt.sha256"}
    digest, name = (file.parent / "a.pt.sha256").read_text().split()
    assert (len(digest), name) == (64, "a.pt")
    (file.parent / "a.pt.sha256").unlink()  # files from elsewhere have none
    assert load_tensors(file)["step"] == 3


def test_every_flipped_bit_is_detected(file):
    intact, flips = file.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged, position = bytearray(intact), flips.randrange(len(intact))
        damaged[position] ^= 1 << flips.randrange(8)
        file.write_bytes(damaged)
        _refused(file, "the file is damaged")


def test_without_a_hash_damage_is_refused_or_unseen(file):
    """Control: torch alone loads many damaged files.

    What it refuses becomes one line, whatever it raised.
    """
    intact, flips, errors = file.read_bytes(), random.Random(0), []
    (file.parent / "a.pt.sha256").unlink()
    begin = intact.index(b"\x80\x02")  # of the pickle; torch raises all kinds of errors for it
    for number in range(600):
        damaged = bytearray(intact)
        for _ in range(flips.choice([1, 4])):
            position = flips.randrange(len(intact)) if number % 2 else begin + flips.randrange(300)
            damaged[position] ^= 1 << flips.randrange(8)
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_tensors(file)
            except UserError as error:
                errors += [str(error)]
    assert all(len(line.splitlines()) == 1 for line in errors)
    assert 50 < len(errors) < 550


@pytest.mark.parametrize("with_hash", [True, False])
@pytest.mark.parametrize("length", [0, 1, 100, "half", -1])
def test_a_truncated_file_is_refused(file, length, with_hash):
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2 if length == "half" else length])
    if not with_hash:
        (file.parent / "a.pt.sha256").unlink()
    _refused(file)


@pytest.mark.parametrize("with_hash", [True, False])
def test_zeros_are_refused(file, with_hash):
    file.write_bytes(bytes(file.stat().st_size))
    if not with_hash:
        (file.parent / "a.pt.sha256").unlink()
    _refused(file)


def test_an_absent_file_and_a_file_of_something_else(tmp_path):
    _refused(tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    _refused(tmp_path / "list.pt", "a list, not a state dict")
    (tmp_path / "text.pt").write_text("hello\nworld\n")
    _refused(tmp_path / "text.pt")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "write", [lambda o, f: torch.save(o, f), pickle.dump], ids=["torch", "pickle"]
)
def test_a_hostile_pickle_is_not_executed(tmp_path, monkeypatch, write, forced):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with open("hostile.pt", "wb") as file:
        write({"weight": Hostile()}, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _refused(tmp_path / "hostile.pt")
        assert not (tmp_path / "executed").exists()
        if forced and write is not pickle.dump:
            torch.load("hostile.pt")  # control: the variable acts where weights_only is not given
            assert (tmp_path / "executed").exists()


def test_objects_and_values_by_name(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "a.pt", model=model, optimizer=optimizer, step=7)
    fresh = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    saved = load_tensors(tmp_path / "a.pt")
    restore(tmp_path / "a.pt", saved, model=other, optimizer=fresh, step=None)
    assert saved["step"] == 7
    assert torch.equal(other.weight, model.weight)
    assert fresh.param_groups[0]["lr"] == 0.1
    ours, theirs = fresh.state[other.weight], optimizer.state[model.weight]
    assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"model": nn.Linear(3, 2)}, r"\(step\b.* only"),
        ({"model": nn.Linear(3, 2), "step": None, "scaler": None}, r"\(scaler\b.* only"),
        ({"model": nn.Linear(3, 4), "step": None}, "its model does not fit this run"),
        (
            {"model": nn.Sequential(nn.Linear(3, 2)), "step": None},
            "its model does not fit this run",
        ),
    ],
)
def test_names_and_shapes_must_agree(tmp_path, asked, match):
    save(tmp_path / "a.pt", model=nn.Linear(3, 2), step=1)
    with pytest.raises(UserError, match=match) as caught:
        restore(tmp_path / "a.pt", load_tensors(tmp_path / "a.pt"), **asked)
    assert caught.value.code == 4
    assert len(str(caught.value).splitlines()) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file):
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_tensors(file, {"weight": lambda: None})

    def full(_):
        raise OSError(28, "No space left on device")

    match = r"a\.pt: cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=match) as caught:
        write_atomically(file, full)
    assert caught.value.code == 5
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before


@pytest.mark.parametrize("limit", [0, 1, 1000, 40_000])
def test_a_full_disk_is_exit_5_and_the_older_file_loads(file, limit):
    """The limit of a file's size stands for the disk: zip headers, the data or the end do not fit.

    The real thing, unlike an OSError of a test's own: torch's zip writer turns it into others.
    """
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}
    large = {**STATE, "weight": torch.rand(100, 100)}

    def with_limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save_tensors(file, large)

    assert in_a_fork(lambda: with_limit(limit)) == 5
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before
    assert torch.equal(load_tensors(file)["weight"], STATE["weight"])
    assert in_a_fork(lambda: with_limit(100_000)) == 0  # control
    assert load_tensors(file)["weight"].shape == (100, 100)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_device_that_is_full_is_exit_5(file):
    before = {p.name: p.read_bytes() for p in file.parent.iterdir()}

    def full(temporary) -> None:
        with open("/dev/full", "wb") as device:
            device.write(b"1")

    with pytest.raises(UserError, match="cannot be written") as caught:
        write_atomically(file, full)
    assert caught.value.code == 5
    assert {p.name: p.read_bytes() for p in file.parent.iterdir()} == before


def test_a_file_is_removed_with_its_hash(file):
    """The hash goes first, so that a kill in between leaves a file that loads."""
    hash_file = file.with_name("a.pt.sha256")
    with pytest.MonkeyPatch.context() as patch:
        unlink = type(file).unlink

        def killed(path, *arguments):
            unlink(path, *arguments)
            raise KeyboardInterrupt

        patch.setattr(type(file), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(file)
    assert not hash_file.exists()
    assert load_tensors(file)["step"] == 3
    remove(file)
    assert list(file.parent.iterdir()) == []
    file.mkdir()
    hash_file.mkdir()
    remove(file)  # folders are no files of ours
    assert file.is_dir()
    assert hash_file.is_dir()


def test_only_a_file_that_matches_its_hash_is_intact(file):
    assert is_intact(file)
    file.write_bytes(file.read_bytes() + b"1")
    assert not is_intact(file)
    save_tensors(file, STATE)
    assert is_intact(file)
    file.with_name("a.pt.sha256").write_bytes(b"\xff\xfe")
    assert not is_intact(file)
    remove(file)
    assert not is_intact(file)


def test_a_lock_is_held_by_one_process(tmp_path):
    """Other processes are refused; a fork that lives on, as a loader's worker, does not hold it."""
    path = tmp_path / "run" / ".lock"
    held = lock(path)
    assert in_a_fork(lambda: lock(path)) == 2
    worker = os.fork()
    if worker == 0:
        signal.pause()
        os._exit(0)
    try:
        del held  # not before this line: to close any file of the path frees the lock
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert in_a_fork(lambda: lock(path)) == 0
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_lock_names_its_owner(tmp_path):
    """And is free as soon as the owner is killed."""
    path = tmp_path / ".lock"
    ready, wrote = os.pipe()
    owner = os.fork()
    if owner == 0:
        held = lock(path)
        os.write(wrote, b"1")
        signal.pause()
        del held
        os._exit(0)
    os.read(ready, 1)
    match = rf"out_dir: {tmp_path} is in use by another run \(process {owner} on \S+\); wait for"
    try:
        with pytest.raises(UserError, match=match) as caught:
            lock(path)
        assert caught.value.code == 2
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    lock(path)


def test_a_lock_that_cannot_be_written_is_one_error(monkeypatch):
    """Exit 5, and nothing else is told when the failed attempt is forgotten."""
    told = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    with pytest.raises(UserError, match=r"/proc/none/\.lock: cannot be written") as caught:
        lock(Path("/proc/none/.lock"))
    (Path.cwd() / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: cannot be written \(Is a directory\)"):
        lock(Path.cwd() / ".lock")
    assert caught.value.code == 5
    assert told == []


def test_text_replaces_text(tmp_path):
    write_text(tmp_path / "deep" / "status.json", "one\n")
    write_text(tmp_path / "deep" / "status.json", "zwei ü\n")
    assert (tmp_path / "deep" / "status.json").read_text(encoding="utf-8") == "zwei ü\n"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["status.json"]


def test_trained_classes(tmp_path):
    """From the summary.json in a run folder, or beside the file that is named."""
    folder, model = tmp_path / "run", tmp_path / "run" / "model.pt"
    with pytest.raises(UserError, match=r"there is no \S*run$"):
        trained_classes(str(folder))
    save_tensors(model, STATE)
    assert trained_classes(str(model)) is None  # from elsewhere
    (folder / "status.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished"):
        trained_classes(str(folder))
    assert trained_classes(str(model)) is None  # weights alone may be used
    for text, classes in (("{}", None), ('{"classes": ["b", "a"]}', ["b", "a"])):
        (folder / "summary.json").write_text(text)
        assert trained_classes(str(folder)) == trained_classes(str(model)) == classes
    for text in ("[1]", '{"classes": 3}', '{"classes": ["a"'):
        (folder / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"summary\.json is damaged"):
            trained_classes(str(folder))
