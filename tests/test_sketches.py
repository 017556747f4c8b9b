"""benchmarks/sketches.py: edges become black lines, everything else white."""

import pytest
from PIL import Image

from benchmarks import sketches
from common.errors import UserError


def test_an_edge_is_a_line_and_an_even_area_is_white():
    image = Image.new("RGB", (64, 64), (200, 180, 160))
    image.paste((40, 60, 80), (32, 0, 64, 64))
    pixels = sketches.sketch(image).convert("L")
    assert pixels.getpixel((4, 32)) == pixels.getpixel((60, 32)) == 255
    assert pixels.getpixel((33, 32)) < 50  # beside the edge, on its dark side


def test_a_folder_is_made_again(pictures, tmp_path, monkeypatch, capsys):
    source = pictures("photo", {"cat": 1, "dog": 1})
    for file in source.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".jpg"))
    monkeypatch.setattr("sys.argv", ["sketches.py", str(source), str(tmp_path / "new")])
    assert sketches.main() == 0
    names = {str(file.relative_to(tmp_path / "new")) for file in (tmp_path / "new").rglob("*.*")}
    assert names == {"cat/000.jpg", "dog/000.jpg"}
    with pytest.raises(UserError, match="new exists; choose another folder"):
        sketches.main()
    monkeypatch.setattr("sys.argv", ["sketches.py", str(tmp_path / "none"), str(tmp_path / "x")])
    with pytest.raises(UserError, match="none: there are no jpg files"):
        sketches.main()
