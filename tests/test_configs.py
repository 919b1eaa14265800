"""Every YAML file in configs/ is read strictly and built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from d2kd import DISTILL_HEAD_REGISTRY, ConfigError, Distiller, add_distillation_config
from d2kd.config_files import load_config
from d2kd.config_paths import shipped_names
from d2kd.engine.setup import merged_config
from d2kd.registry import node_name

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "suites"
)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_builds(path, monkeypatch):
    """The file's keys all exist, and student, teacher and heads can be built from it, without
    weights; the meta device makes that cheap at full size."""
    monkeypatch.chdir(ROOT)
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(path))
    cfg.MODEL.DEVICE = "meta"
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    cfg.MODEL.TIMM.PRETRAINED = False
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert isinstance(model, Distiller) == (cfg.MODEL.META_ARCHITECTURE == "Distiller")
    if "distill" not in path.stem and isinstance(model, Distiller) and cfg.DISTILL.HEADS:
        assert len(model.distill_heads) == len(cfg.DISTILL.HEADS)


@pytest.mark.parametrize("student", ["faster_rcnn", "mask_rcnn", "retinanet"])
@pytest.mark.parametrize("head", ["SSIM", "DSIG", "DRKD", "GlobalKnowledge", "MAR"])
def test_each_method_has_a_config_on_coco(student, head):
    """R50 from the model zoo's R101, for each of the five methods and three kinds of detectors."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    name = f"{student}_R50_R101_{node_name(head).lower()}.yaml"
    load_config(cfg, str(ROOT / "configs" / "coco" / name))
    assert list(cfg.DISTILL.HEADS) == [head]
    assert cfg.MODEL.RESNETS.DEPTH == 50 and "_R_101_FPN_3x" in cfg.DISTILL.TEACHER.CONFIG_FILE


def test_outputs_are_apart():
    """No two configs write into one folder: it is output/<path of the config>."""
    for path in CONFIGS:
        if not path.stem.startswith("Base"):
            folder = Path("output") / path.relative_to("configs").with_suffix("")
            cfg = merged_config(str(ROOT / path), [])
            assert cfg.OUTPUT_DIR == str(folder.absolute())


def test_there_are_not_too_many():
    """Each file has a reason to exist; heads without keys of their own are given as KEY VALUE."""
    assert len(shipped_names()) <= 115


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_no_node_is_for_a_head_that_does_not_run(path):
    """A file sets keys of those heads only that it trains with: others would have no effect. A base
    file without heads is for those that are given as KEY VALUE."""
    written = set(yaml.safe_load((ROOT / path).read_text()).get("DISTILL", {}))
    cfg = get_cfg()
    add_distillation_config(cfg)
    load_config(cfg, str(ROOT / path))
    running = {node_name(head) for head in cfg.DISTILL.HEADS}
    of_heads = {node_name(name) for name, _ in DISTILL_HEAD_REGISTRY}
    is_base = path.stem.startswith("Base") and not running
    assert is_base or written & of_heads <= running


def test_unknown_keys_are_refused(tmp_path):
    """A key that does not exist is an error that names close ones."""
    path = tmp_path / "typo.yaml"
    path.write_text("DISTILL:\n  SSIM:\n    WIEGHT: 3.0\n")
    cfg = get_cfg()
    add_distillation_config(cfg)
    with pytest.raises(ConfigError, match="DISTILL.SSIM.WIEGHT.*close: .*DISTILL.SSIM.WEIGHT"):
        load_config(cfg, str(path))
