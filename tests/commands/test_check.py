"""``d2kd check``: all that is to be said of the datasets of a config, and a sheet of samples."""

from __future__ import annotations

import re
import shutil

import pytest
from PIL import Image

from d2kd import cli
from d2kd.commands import check
from d2kd.data.custom import check_datasets

from ..data.parts import Parts, forget_datasets
from ..data.test_loader import truncate
from ..detectors import write_config


@pytest.fixture(autouse=True)
def _forget():
    yield from forget_datasets()


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path)


def run_check(parts: Parts, capsys, *options: str, **values) -> tuple[str, str]:
    """Output of the command, and its error line ("" for none)."""
    parts.write()
    file = write_config(parts.config(**values), parts.folder / "config.yaml")
    error = ""
    try:
        cli.main(["check", "--config-file", file, *options])
    except SystemExit as stop:
        error = str(stop.code)
    return capsys.readouterr().out, error


def test_the_command_on_a_good_dataset(parts, capsys):
    """Nothing to say of the test set, sizes of the training set, and a sheet."""
    sheet = parts.folder / "sheet.png"
    before = parts.files()
    out, error = run_check(parts, capsys, "--sheet", str(sheet))
    assert error == ""
    assert "objects in training: 10 %, 50 % and 90 % of their sizes" in out
    assert re.search("dataset 'v': .*4 images, 12 annotations: nothing to say", out)
    assert f"wrote {sheet}" in out and Image.open(sheet).size == (6 * 320, 2 * 338)
    new = {path.name for path in parts.files() - before}
    assert new == {"sheet.png", "config.yaml", "train.json", "val.json"}


def test_the_command_lists_all(parts, capsys):
    """More than 20 lines where there is more to say; exit with the error line of training."""
    for place, entry in enumerate(parts.train["annotations"][:8]):
        broken = ([], [1, 2, -3, 4], None, [9, 9, 0, 3], [500, 1, 2, 3], [1, 2, float("nan"), 3])
        entry["bbox"] = broken[place % 6]
    parts.train["annotations"][9]["id"] = 1
    parts.train["annotations"][10]["category_id"] = 17
    parts.train["annotations"][11]["iscrowd"] = 5
    parts.train["annotations"][12]["ignore"] = 1
    parts.val["annotations"][0]["id"] = 0
    truncate(parts.folder / "images/train_3.png")
    (parts.folder / "images/train_4.png").unlink()
    out, error = run_check(parts, capsys, "--sheet", "")
    assert len(out.splitlines()) > 20 and "more; 'd2kd check'" not in out
    assert "1 of 6 images are not there" in out
    assert "1 of 5 images that were opened cannot be read" in out
    assert "numbered from 1 for evaluation" in out
    assert error.startswith("error: dataset 't'") and len(error) <= 300 and "\n" not in error


def test_the_command_finds_images_that_were_trained_on(parts, capsys):
    """It opens the images of both sets and compares them."""
    shutil.copy(parts.folder / "images/train_2.png", parts.folder / "images/val_3.png")
    out, error = run_check(parts, capsys, "--sheet", "", "--threads", "1")
    assert error == "" and "1 of 4 images are in 't', too: the same file" in out
    out, _ = run_check(parts, capsys, "--sheet", "", "--no-images")
    assert "the same file" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sheet", "."], "--sheet: '.' must end in .jpg"),
        (["--sheet", "sheet.pdf"], "'sheet.pdf' must end in .jpg or .jpeg or .png"),
        (["--import", "no.py"], "--import: no file 'no.py'"),
        (["DATASETS.TRIAN", "('t',)"], "no config key 'DATASETS.TRIAN'"),
        (["DATASETS.TRAIN", "('tt',)"], "there is no dataset 'tt'"),
        (
            ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"],
            "TEST are empty: name a dataset to check",
        ),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L'"),
    ],
)
def test_mistakes_of_the_command_are_one_line(parts, capsys, options, message):
    """As everywhere; no sheet is left."""
    before = parts.files()
    _, error = run_check(parts, capsys, *options)
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert {path.name for path in parts.files() - before} <= {
        "config.yaml",
        "train.json",
        "val.json",
    }


def test_a_test_set_alone_is_checked(parts, capsys):
    """Without DATASETS.TRAIN. A broken image that is drawn, though not looked for, is named."""
    options = ["--no-images", "--sheet", str(parts.folder / "s.png"), "DATASETS.TRAIN", "()"]
    out, error = run_check(parts, capsys, *options)
    assert error == "" and "dataset 'v'" in out and "dataset 't'" not in out
    truncate(parts.folder / "images/val_2.png")
    out, error = run_check(parts, capsys, *options)
    assert "val_2.png cannot be read" in error and "\n" not in error and "dataset 'v'" in out


def test_a_check_from_python(parts):
    """The same as a function, with the records that the loader would have."""
    parts.write()
    reports, rows = check.check_config(parts.config())
    assert not any(report.fatal for report in reports)
    assert [(name, len(records)) for name, records, _ in rows] == [("t", 6), ("v", 4)]
    check_datasets(parts.config())
