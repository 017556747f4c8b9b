"""Bad input: one line that says what, where and what to do, and exit code 2; nothing is written."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.errors import exit_with
from tests.helpers import (
    SCRIPTS,
    metrics,
    others_slow,
    shot_config,
    street_config,
    tiny_config,
    train,
)

DATA = (
    "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
    "size: 16, batch: 4, root: images, cache: cache}"
)


@pytest.fixture
def config(pictures, tmp_path) -> Path:
    """Ten steps from the folder photo to the folder sketch, into the folder run."""
    pictures("photo", {"cat": 12, "dog": 12})
    pictures("sketch", {"cat": 6, "dog": 6})
    return tiny_config(tmp_path, out_dir="run", data=DATA)


@pytest.fixture
def outcome(capsys):
    """`outcome(script, config, *arguments)` -> (exit code, stdout, lines of stderr)."""

    def end(script: str, config: Path, *arguments: str) -> tuple[int, str, list[str]]:
        with pytest.raises(SystemExit) as stop:
            exit_with(lambda: train(script, config, *arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err.splitlines()

    return end


@pytest.fixture
def refused(outcome):
    """The one line of a run that is refused with code 2 and leaves no out_dir."""

    def line(script: str, config: Path, *arguments: str) -> str:
        code, _, lines = outcome(script, config, *arguments)
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert not Path("run").exists()
        return lines[0]

    return line


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


# --- config


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_key(config, refused, script):
    assert refused(script, config, "data.bach=3") == (
        "error: data.bach=3: unknown key data.bach; did you mean data.batch?"
    )


def test_a_key_of_another_script(config, refused):
    message = refused("train_source", config, "adv_weight=1")
    assert message == (
        "error: adv_weight=1: unknown key adv_weight; "
        "it is a key of train_advent.py, train_dann.py, train_mdd.py"
    )


def test_several_mistakes_have_a_line_each(config, outcome):
    code, _, lines = outcome("train_dann", config, "stepps=3", "amp=half", "optim.lr=x")
    assert code == 2
    assert len(lines) == 3
    assert all(re.match(r"(error: |       )(stepps=3|amp=half|optim\.lr=x): ", x) for x in lines)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "text", ["out_dir: [run", "out_dir: 'run", "a: 1\na: 2\n", "out_dir: !!python/name:os.mkdir ''"]
)
def test_malformed_yaml(config, refused, text):
    config.write_text(text)
    assert re.match(rf"error: {re.escape(str(config))}:\d+: ", refused("train_source", config))


def test_a_second_file_that_is_wrong(config, refused):
    message = refused("train_dann", config, "method.yaml")
    assert message.startswith("error: method.yaml: cannot be read")
    Path("method.yaml").write_text("disc_hiden: 3\n")
    message = refused("train_dann", config, "method.yaml")
    assert message == ("error: method.yaml: unknown key disc_hiden; did you mean disc_hidden?")


@pytest.mark.parametrize("key", ["bn: frozen", "bn_affine: frozen", "bn_running: target"])
def test_keys_of_batch_norm_without_batch_norm(config, refused, key):
    model = f"model={{batch_norm: false, bn: separate, {key}}}"
    if key == "bn: frozen":
        model = "model={batch_norm: false, bn: frozen}"
    message = refused("train_dann", config, model)
    assert f"model.{key}: backbone lenet has no batch norm" in message


def test_conditional_adaptation_of_several_layers(config, refused):
    arguments = ["conditional=cdan", "feature_layers=[layer4, pooled]", "layer_weights=[1, 1]"]
    assert "conditional needs feature_layers: [pooled]" in refused("train_dann", config, *arguments)


def test_an_unknown_layer(config, refused):
    message = "feature_layers: no layer 'fc'; there are layer1, layer2, layer3, layer4, pooled"
    assert message in refused("train_dann", config, "feature_layers=[fc]")


def test_a_process_without_its_launcher(config, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for script in SCRIPTS:
        assert "start all of them by one torchrun command" in refused(script, config)


def test_a_gpu_that_is_not_there(config, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in SCRIPTS:
        message = refused(script, config, "device=cuda")
        assert "device: cuda is asked for but torch sees no GPU" in message


def test_a_loss_that_is_not_finite_is_no_result(config, outcome):
    code, _, lines = outcome(
        "train_source", config, "optim.lr=1000", "optim.weight_decay=1000", "log_every=1"
    )
    assert code == 3
    assert len(lines) == 1
    assert re.match(r"error: step \d+: cls_loss is (nan|inf); lower optim\.lr", lines[0])


# --- data


def test_class_sets_that_differ(config, refused, pictures):
    pictures("other", {"cat": 3, "fox": 3, "hen": 3})
    message = refused("train_dann", config, "data.target.path=other")
    assert "classes differ from the source's: " in message
    assert "only here: fox, hen; only in the source: dog" in message


@pytest.mark.parametrize("key", ["source", "target"])
@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("nowhere", r"there is no folder \S*nowhere"),
        ("empty", r"\S*empty is empty"),
        ("one_empty", r"the class \S*one_empty/dog has no images"),
        (".", r"\S*photo/cat is a folder inside the class photo: is \S*images a level too high\?"),
        ("single", r"\S*single has .*class cat; is it a level too high or .*low\?"),
        ("mixed", r"\S*mixed \w+ both folders and images \(000\.png\)"),
        ("../images/photo", r"\.\./images/photo lies outside images"),
    ],
)
def test_folders_that_hold_something_else(config, refused, pictures, tmp_path, key, path, match):
    images = tmp_path / "images"
    if path == ".":
        shutil.rmtree(images / "sketch")
    elif path == "empty":
        (images / "empty").mkdir()
    elif path == "one_empty":
        pictures("one_empty", {"cat": 3})
        (images / "one_empty" / "dog").mkdir()
    elif path == "single":
        pictures("single", {"cat": 3})
    elif path == "mixed":
        pictures("mixed", {"cat": 3, "dog": 3})
        pictures("mixed", 1)
    other = f"data.{'target' if key == 'source' else 'source'}={{name: drawn_digits}}"
    assert re.search(match, refused("train_dann", config, f"data.{key}.path={path}", other))


@pytest.mark.parametrize("key", ["source", "target", "target_test", "source[1]"])
def test_the_key_of_a_folder_is_named(config, refused, key):
    nowhere = "{name: folder, path: nowhere}"
    change = f"data.{key}={nowhere}"
    if key == "source[1]":
        change = f"data.source=[{{name: folder, path: photo}}, {nowhere}]"
    message = refused("train_source", config, change)
    assert message.startswith(f"error: data.{key}.path: there is no folder images/nowhere; ")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("value", ["[x, y]", "[null]", "5"])
def test_a_source_that_is_no_section(config, outcome, script, value):
    code, _, lines = outcome(script, config, f"data.source={value}")
    assert code == 2
    assert len(lines) == (2 if "," in value else 1)
    assert all("data.source" in line and "must be a mapping, not" in line for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("key", ["data", "data.target"])
def test_a_section_that_is_null(config, refused, script, key):
    message = refused(script, config, f"{key}=null")
    assert message.endswith(f"{key} must be a mapping, not None")


def test_a_source_without_labels(config, refused):
    assert "the source needs labels" in refused("train_dann", config, "data.source.path=photo/cat")


def test_a_list_with_a_missing_file_or_an_unknown_label(config, refused, tmp_path):
    file = tmp_path / "images" / "photo" / "list.txt"
    for line, match in (
        ("cat/999.png 1", r"list\.txt:2: there is no file \S*cat/999\.png"),
        ("dog/000.png wolf", r"list\.txt:2: label 'wolf' is .*class number"),
        ("../sketch/../../secret.png 1", r"list\.txt:2: .*secret\.png lies outside images"),
    ):
        file.write_text(f"cat/000.png 0\n{line}\n")
        source = "data.source={name: list, path: photo/list.txt}"
        assert re.search(match, refused("train_dann", config, source))


def test_a_list_with_a_byte_order_mark(config, outcome, tmp_path):
    text = "".join(f"cat/{i:03d}.png 0\ndog/{i:03d}.png 1\n" for i in range(2))
    (tmp_path / "images" / "photo" / "list.txt").write_text(text, encoding="utf-8-sig")
    names = [
        "data.source={name: list, path: photo/list.txt}",
        "data.target={name: list, path: photo/list.txt}",
    ]
    assert outcome("train_source", config, *names)[0] == 0


def test_a_damaged_or_uncreatable_cache(config, outcome, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, lines = outcome("train_source", config, "data.cache_gb=0", "data.cache=file/cache")
    assert (code, len(lines)) == (5, 1)
    assert "data.cache: file/cache" in lines[0]
    assert outcome("train_source", config, "data.cache_gb=0", "out_dir=first")[0] == 0
    (file, _) = sorted((tmp_path / "cache").glob("decoded_*.bin"), key=lambda f: -f.stat().st_size)
    content = file.read_bytes()
    for damaged, told in ((content[:100], True), (b"", False), (content[::-1], True)):
        file.write_bytes(damaged)
        name = f"out_dir=damaged{len(damaged)}{damaged[:1].hex()}"
        code, out, lines = outcome("train_source", config, "data.cache_gb=0", name)
        assert (code, lines) == (0, [])
        assert out.count(f"warning: cache/{file.name}: has damaged images") == told
        folder = Path(name.removeprefix("out_dir="))
        assert metrics(folder) == metrics(Path("first"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_can_be_repaired(config, outcome, tmp_path, workers):
    image = tmp_path / "images" / "photo" / "dog" / "003.png"
    intact = image.read_bytes()
    image.write_bytes(intact[:150])
    code, _, lines = outcome("train_source", config, f"data.workers={workers}")
    assert code == 2
    assert len(lines) == 1, lines
    match = r"error: images/photo/dog/003\.png: cannot be read as an image \(.*\); .*\(--dry-run"
    assert re.match(match, lines[0])
    image.write_bytes(intact)
    assert outcome("train_source", config, f"data.workers={workers}", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("workers", "count"), [(0, 1), (0, 3), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)]
)
def test_a_domain_smaller_than_the_batch_trains(config, outcome, pictures, workers, count):
    pictures("few", count)
    code, _, lines = outcome(
        "train_dann", config, "data.target.path=few", "data.batch=8", f"data.workers={workers}"
    )
    assert (code, lines) == (0, [])
    assert metrics(Path("run"))[-1]["step"] == 10


def test_a_batch_of_one_under_batch_norm(config, outcome):
    code, _, lines = outcome("train_source", config, "data.batch=1")
    assert code == 2
    assert len(lines) == 1, lines
    assert re.search(r"data\.batch.*bn: frozen", lines[0])
    code, _, lines = outcome(
        "train_source", config, "data.batch=1", "model={bn: frozen, bottleneck: 8}", "--resume"
    )
    assert (code, len(lines)) == (2, 1)
    assert lines[0].endswith("use parts of 2 or more images")
    # Nothing was trained yet, so the folder takes the corrected config.
    assert outcome("train_source", config, "data.batch=2", "--resume")[0] == 0


# --- masks


@pytest.fixture
def streets(tmp_path) -> Path:
    """A config of ten steps, from six images of 40x60 px with masks (day) to six without (dusk)."""
    for i in range(6):
        random = np.random.default_rng(i)
        for part, pixels in (
            ("day/images", random.integers(256, size=(40, 60, 3))),
            ("day/masks", random.integers(3, size=(40, 60))),
            ("dusk", random.integers(100, size=(40, 60, 3))),
        ):
            (tmp_path / "images" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / part / f"{i}.png")
    data = (
        "{task: segmentation, target: {name: folder, path: dusk}, "
        "source: {name: folder, path: day/images, masks: day/masks, ids: [sky, road, car]}, "
        "batch: 2, root: images, cache: cache}"
    )
    model = "{backbone: mobilenet_v2, output_stride: 16}"
    return tiny_config(tmp_path, out_dir="run", data=data, model=model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda mask: mask.crop((0, 0, 60, 30)),
            r"day/masks/3\.png: the mask is 30x60 px, its image .*3\.png 40x60",
        ),
        (
            lambda mask: mask.point(lambda v: 9 if v == 1 else v),
            r"day/masks/3\.png: the mask \w+ 9, which ids .*3 classes: sky, road, car",
        ),
        (
            lambda mask: mask.point(lambda v: v + 1),
            r"day/masks/3\.png: the mask \w+ 3, which ids .*3 classes: sky, road, car",
        ),
        (
            lambda mask: mask.convert("RGB"),
            r"day/masks/3\.png: a mask has one number \w+ pixel, .*colou?rs \(RGB\)",
        ),
        (
            lambda mask: mask.point(lambda v: 7 * v),
            r"day/masks/3\.png: the mask contains 7, 14, which ids .*3 classes: sky, road, car",
        ),
        (None, r"day/images/3\.png has no mask .*day/masks/3\.png"),
    ],
)
def test_a_wrong_mask_is_named(streets, outcome, tmp_path, change, match):
    file = tmp_path / "images/day/masks/3.png"
    mask = Image.open(file).copy()
    file.unlink()
    if change:
        change(mask).save(file)
    code, _, lines = outcome("train_source", streets)
    assert (code, len(lines)) == (2, 1), lines
    assert re.search(match, lines[0])
    mask.save(file)
    resume = ["--resume"] if Path("run").exists() else []
    assert outcome("train_source", streets, *resume)[0] == 0  # with the right mask


def test_an_unlabeled_target_has_pictures_without_labels_and_no_figures(streets, outcome):
    code, out, _ = outcome("train_advent", streets)
    assert code == 0
    assert (
        len(re.findall(r"no target labels to measure with; model.pt: step \d+, by neg_e", out)) == 1
    )
    assert "None" not in out
    assert "IoU" not in out
    pixels = np.asarray(Image.open("run/pictures/step_00000010.png"))
    assert pixels.shape[0] > 4 * 44 + 4  # a legend is below them
    assert pixels.shape[1] == 2 * 64 + 4


def test_a_map_too_small_for_the_discriminator(streets, outcome):
    code, _, lines = outcome(
        "train_advent", streets, "data.target.crop=[31, 60]", "model.bn=separate"
    )
    assert (code, len(lines)) == (2, 1)
    assert "needs 32x32 px, not 31x60; use larger crops" in lines[0]


def test_unequal_crops_in_one_forward(streets, outcome):
    keys = ["feature_layers=[layer4]", "data.target.crop=[32, 60]"]
    code, _, lines = outcome("train_dann", streets, *keys)
    assert (code, len(lines)) == (2, 1)
    assert "source images are 40x60 px and target images 32x60" in lines[0]
    assert outcome("train_source", streets, "data.target.crop=[32, 60]", "out_dir=other")[0] == 0


def test_a_layer_that_a_segmenter_does_not_have(streets, refused):
    assert "no layer 'pooled'; there are layer1, layer2, layer3, layer4" in refused(
        "train_dann", streets
    )


# --- weights


def test_weights_of_another_backbone(config, refused, tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "images" / "resnet18.pth")
    message = refused("train_dann", config, "model={backbone: mobilenet_v2, weights: resnet18.pth}")
    match = (
        r"resnet18\.pth does not fit mobilenet_v2: 260 tensors are missing \(first: \S+\), "
        r"122 tensors are unknown \(first: \S+\); .*weights of another backbone\?"
    )
    assert re.search(match, message)


def test_init_from_another_network(config, refused, tmp_path):
    assert "init_from: there is no nowhere" in refused("train_dann", config, "init_from=nowhere")
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "model.pt")
    for script in SCRIPTS:
        message = refused(script, config, "init_from=model.pt")
        match = r"model\.pt does not fit this model: \d+ tensors are missing \(first: backbone\."
        assert re.search(match, message)
    Path("model.pt").write_text("no weights")
    message = refused("train_dann", config, "init_from=model.pt")
    assert re.search(r"init_from: model\.pt: .*readable checkpoint", message)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["threshold=0"], "threshold must be positive"),
        (["threshold=-0.5"], "threshold must be positive"),
        (["mix=classmix"], "mix: classmix is for data.task: segmentation"),
        (["mix=cutmix"], "mix must be none | classmix, not 'cutmix'"),
        (["teacher=ma"], "teacher must be none | ema, not 'ma'"),
        (["teacher=none", "evaluate=teacher"], "evaluate: teacher needs teacher: ema"),
        (["teacher_bn=both"], "teacher_bn must be own | student, not 'both'"),
        (["ema_decay=1"], "ema_decay must lie in [0, 1)"),
        (["portions=[0.2]"], "portions must be two numbers in (0, 1]"),
        (["portions=[0, 1]"], "portions must be two numbers in (0, 1]"),
        (["pseudo_warmup=2"], "pseudo_warmup must lie in [0, 1]"),
        (
            ["strong_augment={bluur: {}}"],
            "strong_augment: no operation 'bluur'; did you mean blur?",
        ),
        (
            ["strong_augment={cutout: {side: 2}}"],
            "strong_augment.cutout.side must lie in [0, 1], not 2",
        ),
        (
            ["data.source.augment={flop: {}}"],
            "data.source.augment: no operation 'flop'; did you mean flip?",
        ),
        (
            ["data.target_test={name: drawn_digits, augment: {}}"],
            "data.target_test.augment: test images are never",
        ),
        (["init_from=nowhere"], "init_from: there is no nowhere"),
    ],
)
def test_self_training(config, refused, keys, match):
    assert match in refused("train_pseudo", config, *keys)


def test_a_strong_view_of_maps_keeps_pixels_in_their_place(tmp_path, refused):
    config = street_config(tmp_path, "train_pseudo", out_dir="run")
    assert "strong_augment: no operation 'flip'" in refused(
        "train_pseudo", config, "strong_augment={flip: {}}"
    )
    message = refused("train_pseudo", config, "strong_augment={zoom: {}}")
    assert message.endswith("there are photometric, jitter, blur, cutout")


def test_classmix_of_two_sizes(tmp_path, refused, outcome):
    config = street_config(tmp_path, "train_pseudo", out_dir="run")
    message = refused("train_pseudo", config, "data.target.crop=[32, 96]", "model.bn=separate")
    assert "mix: classmix pastes source onto target images; " in message
    assert "give data.source and data.target the same crop" in message
    code, _, lines = outcome("train_pseudo", config, "data.target.crop=null", "model.bn=separate")
    assert (code, len(lines)) == (2, 1)
    assert "mix: classmix pastes source onto target images, but " in lines[0]
    assert "64x64 and 64x128 px" in lines[0]


@pytest.fixture
def shot(tmp_path) -> Path:
    return shot_config(tmp_path / "start", out_dir="run")


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (
            ["data.source={name: drawn_digits}"],
            "data.source must be null, not {'name': 'drawn_digits'}",
        ),
        (["data.source=mnist"], "data.source must be null, not 'mnist'"),
        (["data.source.augment={flip: {}}"], "data.source must be null, not {"),
        (["data.classes_from=elsewhere"], "init_from or data.classes_from: there is no elsewhere"),
        (["init_from=null"], "init_from is missing: name a run of train_source.py"),
        (["init_from=nowhere"], "there is no nowhere"),
        (
            ["init_from=start"],
            "start has no summary.json that names the classes; name the folder of a finished run",
        ),
        (
            ["model.bottleneck=8"],
            "this model: 7 tensors are missing (first: bottleneck.",
        ),
        (
            ["data.target={name: folder, path: photo}", "data.root=images"],
            "its classes differ from the source's",
        ),
        (["select=source_val"], "select: source_val needs source images, which are not read here"),
        (["centroid_every=0"], "centroid_every must be positive"),
        (["strong_augment={bluur: {}}"], "strong_augment: no operation 'bluur'"),
        (["data.augment={bluur: {}}"], "augment: no operation 'bluur'"),
    ],
)
def test_source_free(shot, pictures, refused, keys, match):
    pictures("photo", {"cat": 12, "dog": 12})
    assert match in refused("train_shot", shot, *keys)


def test_source_free_from_a_damaged_summary(shot, refused):
    Path("start/source/summary.json").write_text('{"classes": ')
    assert "summary.json is damaged; finish the run again" in refused("train_shot", shot)
    Path("start/source/summary.json").write_text("{}")
    assert "start/source has no summary.json that names the classes" in refused("train_shot", shot)
    Path("start/source/summary.json").unlink()
    assert "start/source is not finished; " in refused("train_shot", shot)


# --- the run folder


@pytest.fixture
def finished(config, outcome) -> Path:
    assert outcome("train_source", config)[0] == 0
    return Path("run")


def test_a_used_folder_names_both_ways_out(config, finished, outcome):
    before = listing(finished)
    code, _, lines = outcome("train_source", config)
    assert (code, len(lines)) == (2, 1)
    assert "add --resume" in lines[0]
    assert "choose another with out_dir=" in lines[0]
    assert listing(finished) == before
    assert outcome("train_source", config, "out_dir=another")[0] == 0


def test_resuming_a_finished_run_says_so(config, finished, outcome):
    before = listing(finished)
    code, out, lines = outcome("train_source", config, "--resume")
    assert (code, lines) == (0, [])
    assert "run: finished already" in out
    assert listing(finished) == before


def test_resuming_under_another_config_names_the_key(config, finished, outcome):
    before = listing(finished)
    for changes, named in (
        (["optim.lr=0.5"], ["optim.lr 0.02 -> 0.5"]),
        (["data.batch=5", "seed=3"], ["data.batch 4 -> 5, seed 0 -> 3"]),
        (["data.augment={flip: {}}"], ["data.augment {} -> {'flip': {}}"]),
    ):
        code, _, lines = outcome("train_source", config, "--resume", *changes)
        assert (code, len(lines)) == (2, 1)
        assert "--resume: run was trained under another config" in lines[0]
        assert all(text in lines[0] for text in named)
    assert listing(finished) == before
    free = ["save_every=7", "data.workers=2", "data.cache=elsewhere", "data.cache_gb=0"]
    # Keys that change no result are free.
    assert outcome("train_source", config, "--resume", *free)[0] == 0


def test_resuming_with_another_script(config, finished, outcome):
    """The run is finished, but by another method: an error, not "nothing to do"."""
    before = listing(finished)
    code, out, lines = outcome("train_dann", config, "--resume")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("error: ")
    assert "finished" not in out
    assert listing(finished) == before


def test_a_damaged_status_is_named(config, finished, outcome):
    for text in ("[1]", '{"state": "fini'):
        (finished / "status.json").write_text(text)
        code, _, lines = outcome("train_source", config, "--resume")
        assert (code, len(lines)) == (2, 1)
        assert lines[0].startswith("error: run/status.json is damaged; remove it to ")
    (finished / "status.json").unlink()
    assert outcome("train_source", config, "--resume")[0] == 0


def test_an_out_dir_that_is_no_run_folder(config, outcome, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    for arguments, message in (
        (["out_dir=config.yaml"], "out_dir: config.yaml is a file; choose another out_dir"),
        (["out_dir=config.yaml/run"], "out_dir"),
        (["out_dir=full"], "out_dir: full is used"),
        (["out_dir=full", "--resume"], "out_dir: full is used, and has no config.yaml"),
    ):
        code, _, lines = outcome("train_source", config, *arguments)
        assert code in (2, 5)
        assert len(lines) == 1
        assert message in lines[0]
    assert listing(tmp_path / "full") == {"diary.txt": b"dear diary"}


DRAWN = ["data.target={name: drawn_digits}", "data.source={name: drawn_digits}"]


@pytest.mark.parametrize("script", others_slow(SCRIPTS, ("train_dann", "train_adda")))
@pytest.mark.parametrize(
    "keys", [[], ["data.cache_gb=0"], ["data.workers=2"], [*DRAWN, "conditional=cdan_e"]]
)
def test_a_dry_run_writes_nothing(config, outcome, tmp_path, script, keys):
    keys = [key for key in keys if script == "train_dann" or not key.startswith("conditional")]
    before = listing(tmp_path)
    code, out, lines = outcome(script, config, "--dry-run", *keys)
    assert (code, lines) == (0, [])
    assert "source " in out
    assert "images" in out
    assert "nothing was written" in out
    assert listing(tmp_path) == before


def test_a_dry_run_leaves_a_used_folder_alone(config, finished, outcome, tmp_path):
    before = listing(tmp_path)
    for arguments, code in ((["--dry-run"], 2), (["--dry-run", "--resume"], 0)):
        assert outcome("train_source", config, *arguments)[0] == code
        assert listing(tmp_path) == before
    assert outcome("train_source", config, "--dry-run", "data.source.path=nowhere")[0] == 2


@pytest.mark.parametrize(
    ("out_dir", "code", "message"),
    [
        ("config.yaml/run", 2, "out_dir: config.yaml is a file; choose another out_dir"),
        ("full", 2, "out_dir: full is used, and has no config.yaml, so it is not a run folder"),
        ("n" * 300, 2, f"out_dir: {'n' * 300} cannot be used (File name too long); choose another"),
        ("gone", 2, "out_dir: gone is a file; choose another out_dir"),
        ("locked/run", 5, "out_dir: locked cannot be written to; choose another out_dir"),
    ],
)
def test_a_dry_run_refuses_the_out_dir_that_the_run_would(
    config, outcome, tmp_path, monkeypatch, out_dir, code, message
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    access = os.access  # the tests may run as root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked" and access(path, 2))
    before = listing(tmp_path)
    for arguments in (["--dry-run"], []):
        found, out, lines = outcome("train_source", config, f"out_dir={out_dir}", *arguments)
        assert (found, len(lines)) == (code, 1)
        assert lines[0].startswith(f"error: {message}")
        assert "images" not in out  # before the data are opened
        assert listing(tmp_path) == before


def test_ctrl_c_while_the_data_are_opened(config, outcome, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(
        "training.run.open_domains", lambda *arguments: signal.raise_signal(signal.SIGINT)
    )
    assert outcome("train_source", config) == (130, "", ["stopped by SIGINT"])
    assert not Path("run").exists()


def test_too_little_memory_names_what_takes_it(config, outcome, monkeypatch, tmp_path):
    """Of the batch, and of the images or their crops."""
    monkeypatch.setattr("training.log.Log.add", lambda *_, **__: torch.empty(2**50))
    code, _, lines = outcome("train_source", config)
    assert (code, len(lines)) == (2, 1)
    assert "out of memory with data.batch=4, data.eval_batch=250, data.size=16 (" in lines[0]
    assert json.loads(Path("run/status.json").read_text())["state"] == "failed"
    line = outcome("train_dann", config, "data.target_batch=6", "out_dir=other")[2][-1]
    assert "data.batch=4, data.eval_batch=250, data.target_batch=6, data.size=16 (" in line
    streets = street_config(tmp_path, "train_source", out_dir="streets")
    line = outcome("train_source", streets)[2][-1]
    crops = "data.source.crop=[64, 64], data.target.crop=[64, 64] ("
    assert f"out of memory with data.batch=2, data.eval_batch=3, {crops}" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dry_run_of_all_files_names_every_mistake(config, streets, outcome, tmp_path, workers):
    arguments = ["--dry-run", f"data.workers={workers}"]
    code, out, _ = outcome("train_source", streets, *arguments, "--all")
    assert code == 0
    assert "--all: each of 18 files can be used" in out
    day = tmp_path / "images" / "day"
    for name in ("images/1.png", "masks/5.png"):
        (day / name).write_bytes((day / name).read_bytes()[:-40])
    Image.open(day / "masks/2.png").point(lambda v: 7 * v).save(day / "masks/2.png")
    damaged = tmp_path / "images" / "dusk" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    before = listing(tmp_path)
    code, _, lines = outcome("train_source", streets, *arguments, "--all")
    assert (code, len(lines)) == (2, 5)
    assert lines[0] == "error: 4 files cannot be used:"
    text = "\n".join(lines)
    for match in (
        r"day/images/1\.png: cannot",
        r"dusk/3\.png: cannot",
        r"day/masks/5\.png: cannot",
    ):
        assert re.search(match, text)
    assert "masks/2.png: the mask contains 7, 14, which ids does not define" in text
    assert listing(tmp_path) == before


def test_all_goes_with_a_dry_run(config, refused):
    assert refused("train_source", config, "--all") == "error: --all goes with --dry-run"


# --- the real commands


def test_the_real_command_refuses_in_one_line(config, command):
    code, out, err = command("train_dann", "--config", config, "stepps=3")
    assert (code, out) == (2, "")
    assert err == "error: stepps=3: unknown key stepps; did you mean steps?\n"
    assert not Path("run").exists()


def test_the_real_command_ends_when_a_worker_meets_an_unreadable_image(config, command, tmp_path):
    """It does not wait for its workers, and they print nothing."""
    for image in (tmp_path / "images" / "photo" / "cat").iterdir():
        image.write_bytes(image.read_bytes()[:150])  # its header can be read
    code, _, err = command("train_dann", "--config", config, "data.workers=2")
    assert code == 2
    match = r"error: images/photo/cat/\d+\.png: cannot be read as an image \(.*\); .*again\)\n"
    assert re.fullmatch(match, err)


def test_debug_shows_where_it_happened(config, outcome, monkeypatch):
    arguments = ["data.source.path=nowhere", "--debug"]
    monkeypatch.setattr("sys.argv", ["train_dann.py", *arguments])
    code, _, lines = outcome("train_dann", config, *arguments)
    assert code == 2
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: data.source.path: there is no folder")
