"""The commit of the code that runs."""

import re
import shutil
import subprocess

import pytest

from common import provenance
from common.provenance import code_version
from tests.helpers import ROOT


def git(folder, *arguments: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose common/provenance.py takes the place of this one's."""
    folder = tmp_path / "project"
    (folder / "common").mkdir(parents=True)
    (folder / "common" / "provenance.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(folder / "common" / "provenance.py"))
    # Git would search the folders above and read the user's settings.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "no_settings"))
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_a_clean_and_a_changed_tree(repository):
    clean = code_version()
    assert re.fullmatch(r"[0-9a-f]{10}", clean)
    (repository / "new.txt").write_text("not under version control")
    assert code_version() == clean
    (repository / "train_new.py").write_text("x = 1\n")
    assert code_version() == f"{clean}-dirty"
    (repository / "train_new.py").unlink()
    assert code_version() == clean
    (repository / "common" / "provenance.py").write_text("x = 2\n")
    assert code_version() == f"{clean}-dirty"
    git(repository, "commit", "--quiet", "--all", "--message", "second")
    assert re.fullmatch(r"[0-9a-f]{10}", code_version())
    assert code_version() != clean


def test_a_tag_is_shown(repository):
    git(repository, "tag", "--annotate", "v1.0", "--message", "v1.0")
    assert code_version() == "v1.0"


def test_outside_of_a_repository(tmp_path, monkeypatch):
    file = tmp_path / "copy" / "common" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(file))
    file.parent.mkdir(parents=True)
    assert code_version() is None


def test_a_copy_inside_another_repository(repository, monkeypatch):
    file = repository / "vendor" / "copy" / "common" / "provenance.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert code_version() is None


def test_without_git(repository, monkeypatch):
    assert code_version() is not None  # control
    monkeypatch.setenv("PATH", str(repository / "nothing"))
    assert code_version() is None


def test_a_repository_without_a_commit(repository, tmp_path, monkeypatch):
    file = tmp_path / "empty" / "common" / "provenance.py"
    file.parent.mkdir(parents=True)
    git(file.parents[1], "init", "--quiet")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert code_version() is None


@pytest.mark.parametrize("name", ["datasets", "runs", "cache"])
def test_a_link_in_place_of_a_folder_is_ignored_too(tmp_path, name):
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "--quiet")
    shutil.copy(ROOT / ".gitignore", repository)
    (repository / name).symlink_to(tmp_path)
    (repository / "data").symlink_to(tmp_path)  # control
    done = subprocess.run(
        ["git", "-C", repository, "status", "--short"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["??", ".gitignore", "??", "data"]
