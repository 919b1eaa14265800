"""d2kd show --heads: pictures of what heads distil."""

from __future__ import annotations

import pytest
import torch
from matplotlib import pyplot as plt

from d2kd import DISTILL_HEAD_REGISTRY
from d2kd.cli import main
from d2kd.commands import sketches
from d2kd.errors import ConfigError
from d2kd.losses.dsig import cosine_graph
from d2kd.meta_arch import Distiller

from ..data.parts import Parts
from ..data.test_evaluation import as_rle
from ..data.test_loader import forgetting, truncate
from ..detectors import DENSE_HEADS, detector_config, distiller_config, make_batch, write_config

HEADS = [name for name, head in DISTILL_HEAD_REGISTRY if head.__module__.startswith("d2kd.")]


def config(arch, heads, tmp_path):
    teacher = write_config(detector_config(arch, width=24, num_classes=10), tmp_path / "t.yaml")
    student = detector_config(arch, num_classes=10)
    student.DATASETS.TRAIN, student.DATASETS.TEST = ("digits_tiny_train",), ()
    return distiller_config(student, heads, teacher)


@pytest.mark.parametrize("arch", ["mask", "retinanet"])
def test_all_heads_are_drawn(arch, digits_root, tmp_path, capsys):
    """Of every head that the pair can have: a picture per image, and a line per row of it."""
    masks = ("MaskMimic",) if arch == "retinanet" else DENSE_HEADS
    heads = [name for name in HEADS if name not in masks]
    file = write_config(config(arch, heads, tmp_path), tmp_path / "c.yaml")
    output = str(tmp_path / "pictures" / "p.png")
    main(["show", "--config-file", file, "--images", "0", "3", "--heads", "--output", output])
    for index in (0, 3):
        picture = plt.imread(tmp_path / "pictures" / f"p_{index}.png")
        assert picture.std() > 0.05
    text = capsys.readouterr().out
    for name in heads:
        assert f"image 3: {name} (" in text, name
    assert "image 0: gap of the pyramids: stride" in text and "% apart" in text
    assert "image 0: MAR: mask (" in text and "image 0: DSIG: graph: edges, teacher (" in text
    assert "image 0: DRKD: graph: relations, teacher (" in text
    assert "image 0: GlobalKnowledge: no prototypes yet" in text


@pytest.fixture
def parts(tmp_path):
    yield from forgetting(Parts(tmp_path))


def test_masks_are_taken_and_a_broken_image_is_named(parts, tmp_path):
    """RLE masks set INPUT.MASK_FORMAT, as in training."""
    for entry in parts.train["annotations"]:
        entry["segmentation"] = as_rle(entry, packed=True)
    parts.write()
    file = write_config(parts.config("mask"), tmp_path / "c.yaml")
    words = ["show", "--config-file", file, "--output", str(tmp_path / "p.png")]
    main(words)
    assert (tmp_path / "p.png").is_file()
    truncate(tmp_path / "images/train_1.png")
    with pytest.raises(SystemExit, match="^error: image .*train_1.png cannot be read"):
        main(words)


def distiller_of(arch, heads, tmp_path) -> Distiller:
    return sketches.build_distiller(config(arch, heads, tmp_path), heads)


def test_where_a_loss_pulls(tmp_path):
    """The gradient's length per cell: zero on levels that the head does not read, only there."""
    cfg = config("faster", ["FeatureMimic"], tmp_path)
    cfg.DISTILL.FEATURE_MIMIC.STRIDES = [8]
    distiller = sketches.build_distiller(cfg, ["FeatureMimic"])
    gap, pull = sketches.sketch_image(distiller, make_batch()[0], ["FeatureMimic"])
    assert [s for s, _ in gap.cells.values()] == [4, 8, 16, 32, 64]
    for stride, level in pull.cells.values():
        assert (level > 0).all() == (stride == 8), stride
        assert (level == 0).all() == (stride != 8), stride
    assert "stride 8: 100%" in pull.cells


def test_a_gap_of_nothing(tmp_path):
    """A student that is its teacher is nowhere apart from it."""
    distiller = distiller_of("faster", ["SSIM"], tmp_path)
    cfg = config("faster", ["SSIM"], tmp_path)
    cfg.DISTILL.TEACHER.CONFIG_FILE = write_config(
        detector_config("faster", num_classes=10), tmp_path / "same.yaml"
    )
    same = sketches.build_distiller(cfg, ["SSIM"])
    same.teacher.model.load_state_dict(same.student.state_dict(), strict=False)
    other, none = (sketches.sketch_image(d, make_batch()[0], [])[0] for d in (distiller, same))
    for row, is_same in ((other, False), (none, True)):
        shares = [float(gap.sum()) for _, gap in row.cells.values()]
        assert all(0 <= share <= 1 for share in shares)
        assert (max(shares) < 1e-3) == is_same


def test_graphs_are_those_of_the_head(tmp_path):
    """DSIG's edges are the cosines of its nodes; the strongest are drawn."""
    distiller = distiller_of("faster", ["DSIG"], tmp_path)
    *_, row = sketches.sketch_image(distiller, make_batch()[0], ["DSIG"])
    boxes, edges = next(iter(row.cells.values()))
    assert boxes.shape == (len(edges), 4) and edges.shape[0] == edges.shape[1] > 1
    assert torch.allclose(edges, edges.T, atol=1e-6) and edges.abs().max() <= 1 + 1e-6
    nodes = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [4.0, 4.0, 6.0, 8.0], [1.0, 1.0, 3.0, 3.0]])
    axis = plt.figure().add_subplot()
    sketches.draw_graph(axis, boxes, cosine_graph(nodes[None])[0])
    segments, colours = axis.collections[1].get_segments(), axis.collections[1].get_colors()
    assert segments[0].tolist() == [[1.0, 1.0], [5.0, 6.0]] and colours[0, 3] == 1
    assert (colours[1:, 3] == 0).all()
    plt.close("all")


def test_prototypes_and_no_objects(tmp_path):
    """Cells are compared with prototypes that there are; an image without objects is drawn."""
    heads = ["GlobalKnowledge", "DSIG", "DRKD", "MAR"]
    distiller = distiller_of("faster", heads, tmp_path)
    bank = distiller.distill_heads["GlobalKnowledge"].bank
    for stride in bank.strides:
        student, teacher, present = bank.level(stride)
        student[2, 0], teacher[2, 0], present[2, 0] = 1.0, 1.0, True
    item = make_batch((0,))[0]
    rows = sketches.sketch_image(distiller, item, heads)
    titles = [row.title for row in rows]
    assert "GlobalKnowledge: nearest prototype, teacher" in titles
    for row in rows:
        for first, second in row.cells.values():
            assert second.isfinite().all() and (not isinstance(first, int) or (second >= 0).all())
    plt.close(sketches.draw_rows([(item, row) for row in rows], "BGR"))


def test_heads_that_the_config_has_not(tmp_path):
    cfg = config("faster", ["SSIM"], tmp_path)
    with pytest.raises(
        ConfigError, match=r"--heads DSIG: the config's DISTILL.HEADS are \['SSIM'\]"
    ):
        sketches.build_distiller(cfg, ["DSIG"])
