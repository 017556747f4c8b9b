"""Segmentation: what mask numbers mean, files, joint augmentation, loaders and splits."""

import numpy as np
import pytest
import torch
from PIL import Image

import data.decoded
from common.errors import UserError
from common.metrics import IGNORE_INDEX
from data import drawn_street, eval_loader, open_domains, train_loader
from data.augment import Crops, resize_mask
from data.config import DataConfig, DomainConfig
from data.decoded import decoded_images
from data.folder import read_mask_list, scan_masks
from data.id_maps import NAMED, UNKNOWN, id_map
from data.image_set import image_set
from data.order import Draws, generator
from data.segmentation import TrainBatches

# --- what the numbers mean: the tables of the data sets' own papers and tools, written out

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
SYNTHIA = {
    3: "road", 4: "sidewalk", 2: "building", 21: "wall", 5: "fence", 7: "pole",
    15: "traffic light", 9: "traffic sign", 6: "vegetation", 1: "sky", 10: "person", 17: "rider",
    8: "car", 19: "bus", 12: "motorcycle", 11: "bicycle",
}  # fmt: skip
THIN = {"wall", "fence", "pole"}


@pytest.mark.parametrize(
    ("name", "table", "left_out", "void", "count"),
    [
        ("cityscapes", CITYSCAPES, set(), range(34), 19),
        ("gta5", CITYSCAPES, set(), range(35), 19),
        ("cityscapes16", CITYSCAPES, {"terrain", "truck", "train"}, range(34), 16),
        ("cityscapes13", CITYSCAPES, {"terrain", "truck", "train"} | THIN, range(34), 13),
        ("synthia16", SYNTHIA, set(), range(23), 16),
        ("synthia13", SYNTHIA, THIN, range(23), 13),
    ],
)
def test_named_maps_id_by_id(name, table, left_out, void, count):
    numbers, names = id_map(name, "ids")
    expected = {i: n for i, n in table.items() if n not in left_out}
    assert len(names) == len(set(names)) == count == len(expected)
    for i in range(len(numbers)):
        if i in expected:
            assert names[numbers[i]] == expected[i], i
        else:
            assert numbers[i] == (IGNORE_INDEX if i in void or i == IGNORE_INDEX else UNKNOWN), i


def test_train_ids_are_numbered_as_published():
    """0 road .. 18 bicycle, in the order of the ids; those of SYNTHIA have Cityscapes' names."""
    assert id_map("cityscapes", "ids")[1] == list(CITYSCAPES.values())
    assert id_map("gta5", "ids")[1] == list(CITYSCAPES.values())
    for count in (16, 13):
        assert id_map(f"synthia{count}", "ids")[1] == id_map(f"cityscapes{count}", "ids")[1]


def test_maps_of_the_yaml():
    table, names = id_map(["sky", "road"], "ids")
    assert (names, table[[0, 1, 2, 255]].tolist()) == (
        ["sky", "road"],
        [0, 1, UNKNOWN, IGNORE_INDEX],
    )
    table, names = id_map(["sky", "void", "road"], "ids")
    assert (names, table[:4].tolist()) == (["sky", "road"], [0, IGNORE_INDEX, 1, UNKNOWN])
    table, names = id_map({"sky": 7, "road": [3, 300], "void": [0, 255]}, "ids")
    assert names == ["sky", "road"]
    assert table[[7, 3, 300, 0, 255, 1]].tolist() == [0, 1, 1, IGNORE_INDEX, IGNORE_INDEX, UNKNOWN]


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ("citiscapes", r"data\.source\.ids: .* 'citiscapes'; did you mean cityscapes"),
        ("abc", f"there are {', '.join(NAMED)}"),
        (["sky", "sky"], "names a class twice"),
        (["sky"], "names 1 classes[,;] 2 to 253"),
        ({"sky": 0, "road": 0}, "the id 0 .* two"),
        ({"sky": 0, "road": "1"}, "road: '1' is .* id"),
        ({"sky": 0, "road": [1, -1]}, "road: -1 is .* id"),
        ({"sky": 0, "road": 70000}, "road: 70000 is .* id"),
    ],
)
def test_mistakes_in_a_map(ids, match):
    with pytest.raises(UserError, match=match):
        id_map(ids, "data.source.ids")


# --- files


IDS = {"sky": 0, "road": [1, 2], "void": 9}


@pytest.fixture
def streets(tmp_path):
    """`streets("day", 6)`: images and masks of 20x30 px in images/day, a color per class."""

    def make(name: str, count: int, sizes=((20, 30),), parts=("images", "masks")):
        folder = tmp_path / "images" / name
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            random = np.random.default_rng([i, *name.encode()])
            mask = random.choice([0, 1, 2, 9], (height, width)).astype(np.uint8)
            colours = np.array(
                [[200, 30, 30], [30, 200, 30], [30, 200, 30]] + 7 * [[0, 0, 0]], np.uint8
            )
            for part, pixels, end in (("images", colours[mask], "jpg"), ("masks", mask, "png")):
                (folder / part).mkdir(parents=True, exist_ok=True)
                if part in parts:
                    Image.fromarray(pixels).save(folder / part / f"{i:03d}.{end}")
        return folder

    return make


def config_of(source=None, target=None, **keys) -> DataConfig:
    source = {"path": "day/images", "masks": "day/masks", "ids": IDS, **(source or {})}
    target = {"path": "dusk/images", "masks": "dusk/masks", "ids": IDS, **(target or {})}
    domains = (DomainConfig(**{"name": "folder", **domain}) for domain in (source, target))
    return DataConfig(
        *domains, **{"task": "segmentation", "root": "images", "cache": "cache", "batch": 2, **keys}
    )


def test_consecutive_images_are_held_out_for_the_test(streets):
    streets("day", 4)
    streets("dusk", 10)
    domains = open_domains(config_of(test_share=0.3), 0)
    test, train = domains.target_test.indices.tolist(), domains.target.indices.tolist()
    assert test == list(range(test[0], test[0] + 3))
    assert sorted(test + train) == list(range(10))
    assert domains.target_test.labels is not None
    labeled = open_domains(config_of(test_share=0.3, target_labeled=6), 0)
    assert set(labeled.target_labeled.indices.tolist()) < set(train)
    assert labeled.target_test.indices.tolist() == test


def test_masks_are_read_by_their_numbers(streets):
    folder = streets("day", 10)
    streets("dusk", 4)
    domains = open_domains(config_of(), 0)
    assert domains.classes == ["sky", "road"]
    for i, mask in enumerate(sorted((folder / "masks").iterdir())):
        expected = np.array([0, 1, 1, *[IGNORE_INDEX] * 7])[np.array(Image.open(mask))]
        assert np.array_equal(domains.source.labels[torch.tensor([i])][0].numpy(), expected)
    assert domains.target.labels is None
    assert domains.criteria.labels is None
    assert domains.target_test.labels is not None


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_palette_and_deeper_masks_are_numbers_too(streets, mode):
    folder, numbers = streets("day", 3), np.zeros((20, 30), np.uint8)
    streets("dusk", 3)
    numbers[5:] = 1
    mask = Image.fromarray(numbers)
    if mode == "P":  # the colours of the palette are not looked at
        mask.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9])
    mask = Image.fromarray(numbers.astype(np.uint16)) if mode == "I;16" else mask
    mask = Image.fromarray(numbers.astype(bool)) if mode == "1" else mask
    assert mask.mode == mode
    mask.save(folder / "masks/000.png")
    labels = open_domains(config_of(), 0).source.labels[torch.tensor([0])]
    assert np.array_equal(labels[0].numpy(), numbers)


def _damaged(folder, mistake: str) -> None:
    mask = folder / "masks/001.png"
    numbers = np.array(Image.open(mask))
    if mistake == "size":
        Image.fromarray(numbers[:10]).save(mask)
    elif mistake == "id":
        numbers[0, 0] = 77
        Image.fromarray(numbers).save(mask)
    elif mistake == "colours":
        Image.fromarray(numbers).convert("RGB").save(mask)
    elif mistake == "missing":
        mask.unlink()
    else:
        mask.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("mistake", "ids", "match"),
    [
        (
            "size",
            IDS,
            r"day/masks/001\.png: the mask is 10x30 px, its image .*day/images/001\.jpg 20x30",
        ),
        (
            "id",
            IDS,
            r"day/masks/001\.png: the mask .* 77, which .* \(2 classes: sky, road\)",
        ),
        (
            "id",
            [*"abcdefghij"],
            r"day/masks/001\.png: the mask .* 77, which .* \(10 classes",
        ),
        (
            "colours",
            IDS,
            r"day/masks/001\.png: a mask has one number .*, or a palette, .*\(RGB\)",
        ),
        (
            "missing",
            IDS,
            r"day/images/001\.jpg has no mask .*day/masks/001\.png \(1 of 4 images have none\)",
        ),
        ("damaged", IDS, r"day/masks/001\.png: cannot be read as an image"),
    ],
)
def test_mistakes_in_masks(streets, mistake, ids, match):
    folder = streets("day", 4)
    streets("dusk", 2)
    _damaged(folder, mistake)
    config = config_of({"ids": ids}, {"ids": ids}, batch=1)

    def read_everything() -> None:
        domains = open_domains(config, 0)
        batches = train_loader(domains.source, config, 0, "source", 0, 8)
        _ = [*batches, *eval_loader(domains.source_val, config)]

    with pytest.raises(UserError, match=match) as caught:
        read_everything()
    assert len(str(caught.value).splitlines()) == 1


def test_suffixes_and_folders_within(tmp_path):
    """Cityscapes: a folder a city, and names that share their beginning."""
    root = tmp_path / "images"
    for part, end in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelIds.png")):
        for city in ("ulm", "bonn"):
            (root / part / city).mkdir(parents=True)
            Image.new("L", (8, 8)).save(root / part / city / f"a_0{end}")
            Image.new("L", (8, 8)).save(root / part / city / "a_0_gtFine_color.png")
    files, masks = scan_masks(
        "leftImg8bit", "gtFine", ("_leftImg8bit.png", "_gtFine_labelIds.png"), root, "source"
    )[:2]
    assert [f.relative_to(root).as_posix() for f in files] == [
        "leftImg8bit/bonn/a_0_leftImg8bit.png",
        "leftImg8bit/ulm/a_0_leftImg8bit.png",
    ]
    assert [m.parent.name for m in masks] == ["bonn", "ulm"]
    with pytest.raises(UserError, match=r"has no images that end in \.bmp"):
        scan_masks("leftImg8bit", "gtFine", (".bmp", None), root, "source")
    with pytest.raises(UserError, match="there is no folder"):
        scan_masks("absent", None, (None, None), root, "source")
    with pytest.raises(UserError, match="lies outside"):
        scan_masks("leftImg8bit", "../gtFine", ("_leftImg8bit.png", None), root, "source")


def test_a_folder_too_high_does_not_train_on_masks(streets):
    """The target's own masks lie below it: its labels would be trained on as images."""
    streets("day", 4)
    streets("dusk", 3)
    with pytest.raises(
        UserError, match=r"dusk/images/000\.jpg and .*dusk/masks/000\.png share a name: .* too high"
    ):
        open_domains(config_of(target={"path": "dusk", "masks": None, "ids": None}), 0)
    suffix = {"path": "dusk", "masks": None, "ids": None, "image_suffix": ".jpg"}
    assert len(open_domains(config_of(target=suffix), 0).target) == 3


def test_image_and_mask_in_one_folder_need_suffixes(streets, tmp_path):
    folder = streets("day", 3)
    streets("dusk", 2)
    for mask in (folder / "masks").iterdir():
        mask.rename(folder / "images" / mask.name)
    with pytest.raises(UserError, match="share a name"):
        open_domains(config_of({"masks": "day/images"}), 0)
    source = {"masks": "day/images", "image_suffix": ".jpg", "mask_suffix": ".png"}
    assert open_domains(config_of(source), 0).source.images[torch.tensor([0])].float().std() > 10
    (folder / "images/.checkpoints").mkdir()
    (folder / "images/.checkpoints/000.jpg").write_bytes(b"no image")  # hidden: left aside
    files = scan_masks("day/images", None, (".jpg", None), tmp_path / "images", "source")
    assert len(files.images) == 3


def test_an_upper_bound_is_measured_on_whole_masks_too(streets):
    streets("day", 10)
    config = config_of(
        {"resize": [10, 12]}, {"path": "day/images", "masks": "day/masks", "resize": [10, 12]}
    )
    domains = open_domains(config, 0)
    assert torch.equal(domains.target_test.indices, domains.source_val.indices)
    assert domains.target_test.labels[domains.target_test.indices].shape == (1, 20, 30)
    assert domains.source_val.labels[domains.source_val.indices].shape == (1, 10, 12)


def test_a_crop_that_an_image_has_not_is_named_at_once(streets):
    streets("day", 3, sizes=((20, 30), (24, 18)))
    streets("dusk", 3)
    with pytest.raises(
        UserError,
        match=r"data\.source\.crop: \[20, 20\] is larger than .*day/images/001\.jpg of \[24, 18\]",
    ):
        open_domains(config_of({"crop": [20, 20]}), 0)


def test_list_files(streets, tmp_path):
    folder = streets("day", 3)
    streets("dusk", 2)
    (folder / "list.txt").write_text(
        "\n".join(f"images/{i:03d}.jpg masks/{i:03d}.png" for i in (2, 0))
    )
    images, masks, _ = read_mask_list("day/list.txt", tmp_path / "images", "data.source.path")
    assert [p.name for p in images] == ["002.jpg", "000.jpg"]
    assert [p.name for p in masks] == ["002.png", "000.png"]
    domains = open_domains(config_of({"name": "list", "path": "day/list.txt", "masks": None}), 0)
    assert len(domains.source) + len(domains.source_val) == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("images/000.jpg masks/009.png", r"list\.txt:1: there is no file .*masks/009\.png"),
        (
            "images/000.jpg masks/000.png\nimages/001.jpg",
            r"list\.txt:2: has no mask, .*other lines have",
        ),
        ("images/000.jpg masks/000.png 3", r"list\.txt:1: has 3 words"),
        ("../../x.jpg masks/000.png", "lies outside"),
        ("", "names no image"),
    ],
)
def test_mistakes_in_a_list_of_masks(streets, tmp_path, text, match):
    (streets("day", 2) / "list.txt").write_text(text)
    with pytest.raises(UserError, match=match):
        read_mask_list("day/list.txt", tmp_path / "images", "data.source.path")


@pytest.mark.parametrize("end", ["jpg", "JPEG"])
def test_masks_that_lose_their_numbers(streets, end):
    """Refused, even where the noise happens to stay within ids."""
    folder = streets("day", 4)
    streets("dusk", 2)
    mask = folder / "masks/001.png"
    Image.open(mask).save(folder / f"masks/001.{end}", format="JPEG")
    mask.unlink()
    match = rf"masks/001\.{end}: is a JPEG \(1 of 4 masks are\), .*; save masks as png"
    with pytest.raises(UserError, match=match):
        open_domains(config_of(), 0)
    lines = ["images/000.jpg masks/000.png\n", f"images/001.jpg masks/001.{end}\n"]
    (folder / "list.txt").write_text("".join(lines))
    listed = {"name": "list", "path": "day/list.txt", "masks": None}
    with pytest.raises(UserError, match=match.replace("of 4", "of 2")):
        open_domains(config_of(listed), 0)


def test_keys_of_folders_are_named(streets):
    streets("day", 4)
    streets("dusk", 2)
    for source, match in (
        ({"path": "nowhere"}, r"^data\.source\.path: there is no folder images/nowhere"),
        ({"masks": "nowhere"}, r"^data\.source\.masks: there is no folder images/nowhere"),
    ):
        with pytest.raises(UserError, match=match):
            open_domains(config_of(source), 0)
    keys = {"target_labeled": "none.txt"}
    with pytest.raises(UserError, match=r"^data\.target_labeled: \S*none\.txt cannot be read"):
        open_domains(config_of(**keys), 0)
    with pytest.raises(ValueError, match=r"target\.labels: images without masks are unlabeled"):
        config_of(target={"labels": False})


def test_absent_classes_need_no_key_for_masks(streets):
    """Every class of ids is there, whether it occurs or not; the key tells the alarms."""
    streets("day", 4)
    streets("dusk", 2)
    ids = {"sky": 0, "road": [1, 2], "moon": 7, "void": 9}
    domains = open_domains(config_of({"ids": ids}, {"ids": ids}, absent_classes=["moon"]), 0)
    assert (domains.classes, domains.absent_classes) == (["sky", "road", "moon"], ["moon"])
    with pytest.raises(UserError, match=r"data\.absent_classes: no class 'sun'"):
        open_domains(config_of(absent_classes=["sun"]), 0)
    with pytest.raises(UserError, match="; name the same classes in the ids of both"):
        open_domains(config_of({"ids": ids}), 0)


def test_a_held_out_share_of_masks(streets):
    streets("day", 10)
    streets("dusk", 2)
    half, none = (open_domains(config_of(source_val=share), 0) for share in (0.5, 0))
    assert (len(half.source), len(half.source_val)) == (5, 5)
    assert (len(none.source), none.source_val) == (10, None)


def test_images_without_masks_are_an_unlabeled_target_and_no_source(streets):
    streets("day", 4)
    streets("dusk", 3, parts=("images",))
    domains = open_domains(config_of(target={"masks": None, "ids": None}), 0)
    assert domains.target_test is None
    with pytest.raises(UserError, match=r"day/images: the source needs labels: masks and ids"):
        open_domains(config_of({"masks": None, "ids": None}), 0)


def test_masks_of_the_source_are_resized_and_those_of_the_target_measure_whole(streets):
    streets("day", 3)
    streets("dusk", 3)
    domains = open_domains(config_of({"resize": [10, 12]}, {"resize": [10, 16]}), 0)
    one = torch.tensor([0])
    assert domains.source.images[one].shape == (1, 3, 10, 12)
    assert domains.source.labels[one].shape == (1, 10, 12)
    assert domains.target_test.images[one].shape == (1, 3, 10, 16)
    assert domains.target_test.labels[one].shape == (1, 20, 30)
    whole = np.array(Image.open("images/day/masks/000.png"))
    nearest = Image.fromarray(whole).resize((12, 10), Image.Resampling.NEAREST)
    expected = np.array([0, 1, 1, *[IGNORE_INDEX] * 7])[np.array(nearest)]
    assert np.array_equal(domains.source.labels[one][0].numpy(), expected)


def test_classes_in_another_order_are_matched_by_name(streets):
    streets("day", 3)
    streets("dusk", 3)
    other = {"void": [0], "road": [9], "sky": [1, 2]}
    domains = open_domains(config_of(target={"ids": other}), 0)
    assert domains.classes == ["sky", "road"]
    mask = np.array(Image.open("images/dusk/masks/000.png"))
    expected = np.select([mask == 0, mask == 9], [IGNORE_INDEX, 1], 0)
    assert np.array_equal(domains.target_test.labels[torch.tensor([0])][0].numpy(), expected)
    with pytest.raises(UserError, match="only here: car; only in the source: road"):
        open_domains(config_of(target={"ids": {"sky": 0, "car": [1, 2, 9]}}), 0)


def test_memory_and_file_give_the_same_masks_and_other_ids_another_file(
    streets, tmp_path, monkeypatch
):
    streets("day", 6, sizes=((20, 30), (24, 18)))
    streets("dusk", 3)
    plain, opened = data.decoded._open, []
    monkeypatch.setattr(
        data.decoded, "_open", lambda path, read: (opened.append(path), plain(path, read))[1]
    )

    def read(cache_gb: float, ids=IDS):
        source = open_domains(config_of({"ids": ids}, {"ids": ids}, cache_gb=cache_gb), 0).source
        return [
            (source.images[i][0], source.labels[i][0])
            for i in source.indices.split(1)
            for _ in (0, 1)
        ]

    memory, file = read(1), read(0)
    assert all(
        torch.equal(a, b)
        for x, y in zip(memory, file, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert len({image.shape for image, _ in file}) == 2
    del opened[:]
    again = read(0)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, file, strict=True))
    masks = len([p for p in opened if p.suffix == ".png"])
    assert masks == 2 * (
        6 + 3
    )  # their sizes, held against the images' and for the cache; nothing is decoded again
    swapped = read(0, {"road": [1, 2], "sky": 0, "void": 9})
    assert all(
        torch.equal(a[1] % 255, 1 - b[1] % 255)
        for a, b in zip(swapped, file, strict=True)
        if (b[1] < 2).all()
    )
    names = list((tmp_path / "cache").glob("masks_whole_*.bin"))
    assert len(names) == 4  # two sets, two maps


# --- joint augmentation


def numbered_mask(height: int = 24, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose red channel is its mask."""
    mask = torch.randint(200, (height, width), dtype=torch.uint8, generator=generator("map"))
    return torch.stack([mask, mask // 2, 255 - mask]), mask


def crop_of(image, mask, spec: dict, size, seed: int = 0):
    """A crop of the image, as a batch of one."""
    crops, masks = Crops(spec, size)([image], [mask], Draws(torch.tensor([seed]), "crop"))
    return crops[0], masks[0]


@pytest.mark.parametrize("spec", [{}, {"flip": {}}, {"flip": {"probability": 1}}])
def test_mask_goes_where_the_image_goes(spec):
    image, mask = numbered_mask()
    corners = set()
    for seed in range(20):
        out, out_mask = crop_of(image, mask, spec, (16, 16), seed)
        assert out.shape == (3, 16, 16)
        assert torch.equal(out[0], out_mask)
        corners.add(int(out_mask[0, 0]))
    assert len(corners) > 5  # control: crops differ


def test_zoom_moves_both_and_never_mixes_mask_numbers():
    image, mask = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:40] = 200
    image[:, 10:30, 20:40] = 200
    shares = []
    for seed in range(30):
        out, out_mask = crop_of(image, mask, {"zoom": {"scale": [0.5, 2.0]}}, (30, 40), seed)
        assert out.shape == (3, 30, 40)
        assert set(out_mask.unique().tolist()) <= {0, 200}
        off = (out[0].float() - out_mask.float()).abs() > 100
        assert off.float().mean() < 0.01
        shares.append(float((out_mask == 200).float().mean()))
    assert max(shares) > 2 * min(s for s in shares if s > 0)


def test_masks_are_resized_to_the_nearest_pixel_as_torch_does():
    random = np.random.default_rng(0)
    for old, new in random.integers(1, 1500, (300, 2)).tolist():
        mask = torch.arange(old).remainder(251).to(torch.uint8).expand(3, old)
        nearest = {"size": [2, new], "mode": "nearest-exact"}
        expected = torch.nn.functional.interpolate(mask[None, None], **nearest)[0, 0]
        assert torch.equal(resize_mask(mask, (2, new)), expected)
        assert torch.equal(resize_mask(mask.T, (new, 2)), expected.T)


def test_colors_change_the_image_only():
    image, mask = numbered_mask()
    street = image_set("street", image[None], mask[None], [*"abc"])

    def loaded(spec: dict):
        return [
            x[0] for x in TrainBatches(street, config_of(batch=1, augment=spec), 0, "source")[0]
        ]

    out, out_mask = loaded({"jitter": {"brightness": 0.5}, "photometric": {"noise": 0.1}})
    assert torch.equal(out_mask, mask)
    assert not torch.equal(out, image)
    darker, _ = loaded({"jitter": {"gamma": [2.0, 2.0]}})
    expected = (image.float() / 255).square() * 255
    assert (darker.float() - expected).abs().max() <= 1


def test_a_crop_of_void_alone_is_drawn_again_a_bounded_number_of_times(monkeypatch):
    image, mask = numbered_mask(40, 40)
    mask = torch.full_like(mask, IGNORE_INDEX)
    mask[:, :3] = 1

    def labeled() -> int:
        return sum(bool((crop_of(image, mask, {}, (8, 8), i)[1] == 1).any()) for i in range(100))

    with_redraws = labeled()
    monkeypatch.setattr(Crops, "REDRAWS", 0)
    assert with_redraws > 50 > 30 > labeled() > 0
    monkeypatch.setattr(Crops, "REDRAWS", 10)
    nothing = torch.full_like(mask, IGNORE_INDEX)
    assert (crop_of(image, nothing, {}, (8, 8))[1] == IGNORE_INDEX).all()  # and ends


def test_a_crop_that_is_drawn_again_changes_no_other():
    image, mask = numbered_mask(40, 40)
    void = torch.full_like(mask, IGNORE_INDEX)
    draws = (Draws(torch.arange(2), "crop") for _ in range(2))
    crops = Crops({"zoom": {"scale": [1.0, 2.0]}, "flip": {}}, (8, 8))
    (_, beside_void), _ = crops([image, image], [void, mask], next(draws))
    (_, beside_labeled), _ = crops([image, image], [mask, mask], next(draws))
    assert torch.equal(beside_void, beside_labeled)


def test_a_crop_larger_than_the_image_is_refused():
    image, mask = numbered_mask()
    with pytest.raises(UserError, match=r"crop \[25, 8\] is larger than an image of 24x32 px"):
        crop_of(image, mask, {}, (25, 8))


# --- loaders and splits


def test_batches_with_masks_are_functions_of_seed_domain_and_step():
    images = torch.randint(256, (7, 3, 20, 24), dtype=torch.uint8, generator=generator("street"))
    street = image_set("street", images, images[:, 0] % 5, [*"abcde"], (8, 12))
    spec = {"zoom": {"scale": [0.8, 1.4]}, "flip": {}, "jitter": {"hue": 0.1}}
    config = config_of(batch=3, augment=spec)
    first = TrainBatches(street, config, 1, "source")[4]
    assert (first[0].shape, first[0].dtype) == ((3, 3, 8, 12), torch.uint8)
    assert (first[1].shape, first[1].dtype) == ((3, 8, 12), torch.uint8)
    torch.manual_seed(3)
    again = TrainBatches(street, config, 1, "source")[4]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (
        TrainBatches(street, config, 1, "source")[5],
        TrainBatches(street, config, 2, "source")[4],
    ):
        assert not torch.equal(first[0], other[0])
    alone = TrainBatches(street.unlabeled(), config, 1, "source")[4]
    assert torch.equal(alone, first[0])  # labels do not steer the augmentation


def test_images_of_different_sizes_need_a_crop_or_a_batch_of_one(streets):
    streets("day", 8, sizes=((20, 30), (24, 18)))
    streets("dusk", 3)
    config = config_of()
    with pytest.raises(
        UserError, match=r"its images differ in size.* set data\.source\.crop or resize"
    ):
        list(train_loader(open_domains(config, 0).source, config, 0, "source", 0, 8))
    config = config_of(batch=1)
    shapes = {
        x.shape[2:]
        for x, _ in train_loader(open_domains(config, 0).source, config, 0, "source", 0, 8)
    }
    assert len(shapes) == 2


def test_evaluation_takes_whole_images_of_any_size(streets):
    streets("day", 20)
    streets("dusk", 5, sizes=((20, 30), (20, 30), (24, 18)))
    config = config_of(target={"crop": [8, 8]}, eval_batch=4)
    batches = list(eval_loader(open_domains(config, 0).target_test, config))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 3, 20, 30), (1, 3, 24, 18), (2, 3, 20, 30)]
    assert all(x.shape[2:] == y.shape[1:] and y.dtype == torch.uint8 for x, y in batches)


def test_source_val_is_neighbors(streets):
    """Frames of a video: a random tenth would have its neighbors in the training set."""
    streets("day", 40)
    streets("dusk", 2)
    starts = set()
    for seed in range(6):
        domains = open_domains(config_of(), seed)
        held = domains.source_val.indices.tolist()
        assert held == list(range(held[0], held[0] + 4))
        assert sorted([*held, *domains.source.indices.tolist()]) == list(range(40))
        starts.add(held[0])
    assert len(starts) > 2


def test_classes_of_mean_iou_are_checked(streets):
    streets("day", 3)
    streets("dusk", 3)
    with pytest.raises(UserError, match=r"data\.iou_classes: no class 'car'; there are sky, road"):
        open_domains(config_of(iou_classes=["sky", "car"]), 0)


def test_whole_images_keep_their_own_size(streets):
    files = sorted((streets("day", 3, sizes=((20, 30), (24, 18))) / "images").iterdir())
    images = decoded_images(files, None, None, 0, False)
    assert [tuple(images[torch.tensor([i])].shape) for i in range(3)] == [
        (1, 3, 20, 30),
        (1, 3, 24, 18),
        (1, 3, 20, 30),
    ]


# --- drawn street scenes


def test_drawn_streets_are_the_same_on_every_call_and_dusk_is_darker():
    draw = drawn_street.draw.__wrapped__
    (day, day_masks), (dusk, dusk_masks) = draw("train", False), draw("train", True)
    assert torch.equal(draw("train", False)[0], day)
    assert day.shape == (12, 3, 64, 128)
    assert day_masks.shape == (12, 64, 128)
    assert not torch.equal(draw("test", False)[0][0], day[0])
    for masks in (day_masks, dusk_masks):
        assert set(masks.unique().tolist()) == set(range(len(drawn_street.CLASSES)))
    road_day, road_dusk = (
        x.float().mean(1)[m == drawn_street.ROAD].mean()
        for x, m in ((day, day_masks), (dusk, dusk_masks))
    )
    assert road_dusk < 0.6 * road_day


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_batches_from_files_do_not_depend_on_workers(streets, cache_gb):
    streets("day", 12)
    streets("dusk", 3)
    batches = []
    for workers in (0, 2):
        config = config_of(
            {"crop": [12, 16]}, workers=workers, cache_gb=cache_gb, augment={"flip": {}}
        )
        batches.append(
            list(train_loader(open_domains(config, 0).source, config, 0, "source", 3, 9))
        )
    assert len(batches[0]) == 6
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
