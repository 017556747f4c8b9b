"""MODEL.md says what the run folder holds, in whole sentences and right figures."""

import re

import pytest

from common.config import load_config
from tests.helpers import (
    ROOT,
    TRAINING,
    finetune_config,
    load_script,
    summary,
    tiny_config,
    train,
)
from training import run as run_module
from training.card import LICENSE, model_card, objective

SECTIONS = ["Model", "Data", "Method", "Figures", "Training", "Use", "Limits"]


def sections(text: str) -> dict[str, str]:
    """{title: text} of the sections of a card, which must have those of every card."""
    parts = re.split(r"^## (.*)\n", text, flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(found) == SECTIONS
    assert parts[0].startswith("# ")
    assert text.endswith(f"\n\n{LICENSE}\n")
    assert text.count("```") % 2 == 0
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the first table of a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def dann(tmp_path_factory):
    """(the run folder of a run, what its card was made of)."""
    folder, made = tmp_path_factory.mktemp("dann"), []

    def note(*arguments):
        made.append(arguments)
        return model_card(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "model_card", note)
        patch.setattr(run_module, "code_version", lambda: "0123456789-dirty")
        assert train("train_dann", tiny_config(folder, select="last"), "seed=3") == 0
    return folder / "run", *made


def test_a_card_names_model_data_and_method(dann):
    folder, _ = dann
    text = (folder / "MODEL.md").read_text()
    assert text.startswith("# dann: drawn_digits -> drawn_digits_shifted\n")
    parts = sections(text)
    assert "10 classes, in the order of its outputs: `0`, `1`, `2`" in parts["Model"]
    assert "It is a lenet" in parts["Model"]
    assert re.search(r"^target_test +drawn_digits_shifted: 30 images", parts["Data"], re.M)
    assert "the labels of the 200 source images, and no label of the target" in parts["Data"]
    assert "`train_dann.py`: Domain-adversarial training with gradient" in parts["Method"]
    assert "minimize  cls_loss + adv_weight * adv_loss + mcc_weight * mcc_loss\n" in parts["Method"]
    assert "--config" not in parts["Method"]
    assert "made for the target, drawn_digits_shifted" in parts["Limits"]


def test_a_card_has_the_figures_of_the_summary(dann):
    folder, _ = dann
    text, target = sections((folder / "MODEL.md").read_text())["Figures"], summary(folder)["target"]
    head, _, *lines = rows(text)
    assert head == ["figure", "step", "accuracy", "mean_class_accuracy"]
    for line, name in zip(lines, ("last", "selected", "oracle"), strict=True):
        entry = target[name]
        assert line[0] == (f"{name} (`model.pt`)" if name == "selected" else name)
        assert line[1:3] == [str(entry["step"]), f"{entry['accuracy']:.2f}"]
    assert "on 30 images of the target (the target's own test split)" in text
    assert "it is a bound, not a result" in text
    assert "The last step was taken; nothing was selected." in text


def test_a_card_says_how_the_model_was_trained(dann):
    folder, _ = dann
    parts = sections((folder / "MODEL.md").read_text())
    table = dict(rows(parts["Training"])[2:])
    assert (table["seed"], table["steps"]) == ("3", "10")
    assert table["commit of the code"].startswith("0123456789-dirty (with changes that are in no")
    head = (folder / "config.yaml").read_text().splitlines()[0]
    assert head.startswith("# python train_dann.py --config ")
    assert f"\n{head.removeprefix('# ')}\n" in parts["Training"]
    assert "\npython evaluate.py RUN\npython predict.py RUN FOLDER\n" in parts["Use"]
    # No path of the machine but those in the config.
    config = (folder / "config.yaml").read_text()
    paths = re.findall(r"(?<![\w`])/[\w./-]+", "\n".join(parts.values()))
    assert paths
    assert all(path in config for path in paths)


def changed(made: tuple, **values) -> dict[str, str]:
    """The sections of a card whose summary has other values."""
    run, domains, entries = made
    return sections(model_card(run, domains, {**entries, **values}))


def test_a_card_says_what_went_wrong(dann):
    _, made = dann
    alarms = [{"step": step, "reason": "7 vanished"} for step in range(1, 14)]
    text = changed(made, collapse_alarms=alarms, collapsed={"last": "7 has it all"})["Figures"]
    assert "**The predictions of the last step have collapsed: 7 has it all.**" in text
    assert text.count("7 vanished") == 10
    assert "- and 3 more, in `summary.json`" in text
    text = changed(made, collapse_alarms=[], collapsed={})["Figures"]
    assert "ollapse" not in text


@pytest.mark.parametrize(
    ("trained", "says"),
    [(True, "is part of the training loss and does not"), (False, "is no part of the training")],
)
def test_a_card_says_whether_the_loss_contains_the_criterion(dann, trained, says):
    selection = {"criterion": "infomax", "value": 0.25, "part_of_training_loss": trained}
    text = changed(dann[1], selection=selection)["Figures"]
    assert f"Selected by the criterion infomax (0.25), which {says}" in text


def test_a_card_without_commit_and_with_changes(dann):
    changes = [{"step": 4, "key": "optim.lr", "before": 0.1, "now": 0.2}]
    table = dict(rows(changed(dann[1], commit=None, changed=changes)["Training"])[2:])
    assert table["commit of the code"] == "unknown: it was not in a git repository"
    assert table["changed: optim.lr"] == "0.1 before step 4, then 0.2"


def test_a_card_says_what_the_weights_were(dann):
    run, domains, entries = dann[1]
    assert "The weights were random at the start." in changed(dann[1])["Data"]
    for key, says in (
        ("init_from", "The run started from `one`."),
        ("model.weights", "The backbone started from the pretrained weights `one`."),
    ):
        values = {**run.config_values, key: "one"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "config_values", values)
            assert says in sections(model_card(run, domains, entries))["Data"]


def test_the_card_of_fine_tuning(tmp_path):
    assert train("finetune", finetune_config(tmp_path, steps=4, head_steps=2)) == 0
    text = (tmp_path / "run/MODEL.md").read_text()
    assert text.startswith("# finetune: drawn_digits_shifted\n")
    parts = sections(text)
    assert "Trained with the labels of 160 target images. Those of the 40 val" in parts["Data"]
    assert "stage 1   minimize cls_loss" in parts["Method"]
    assert "so none of this is a test figure" in parts["Figures"]


def test_the_card_of_a_target_without_labels(tmp_path, pictures):
    """A card shows neither a table of figures nor where the decoded images are."""
    pictures("photo", {"cat": 6, "dog": 6})
    pictures("sketch", 8)
    data = (
        "{source: {name: folder, path: photo}, target: {name: folder, path: sketch, labels: "
        f"false}}, size: 16, batch: 4, eval_batch: 4, root: {tmp_path}/images, "
        f"cache: {tmp_path}/cache}}"
    )
    assert train("train_mcc", tiny_config(tmp_path, data=data, steps=2)) == 0
    parts = sections((tmp_path / "run/MODEL.md").read_text())
    assert "2 classes, in the order of its outputs: `cat`, `dog`" in parts["Model"]
    assert "how well the model does on it is not known" in parts["Figures"]
    assert "`model.pt` is step 2" in parts["Figures"]
    assert "On held-out source images, at the last step: accuracy " in parts["Figures"]
    assert not rows(parts["Figures"])
    assert "part of the training loss and does not measure" in parts["Figures"]
    assert "was measured on no target image" in parts["Limits"]
    assert "decoded" not in parts["Data"]
    config = load_config(load_script(ROOT / "train_mcc.py").Config, str(tmp_path / "config.yaml"))
    domains = run_module.open_domains(config.data, 0)
    assert "MiB decoded, " in domains.describe()  # control: the screen shows it


@pytest.mark.parametrize("script", TRAINING, ids=lambda file: file.stem)
def test_every_script_tells_its_objective(script):
    title, formula = objective(load_script(script).__doc__)
    assert "  " not in title
    assert title.endswith(".")
    assert "minimize" in formula
    assert "python" not in formula
    assert formula == formula.strip()


def test_the_docstring_of_a_copy_may_be_short():
    assert objective("Mine.") == ("Mine.", "")
    assert objective("Mine,\nof two lines.\n\nText.\n\n    python mine.py") == (
        "Mine, of two lines.",
        "",
    )
    assert objective("\nMine.\n\n    a = b\n      + c\n\n    d = e\n\n    python mine.py\n") == (
        "Mine.",
        "a = b\n  + c\n\nd = e",
    )
