"""Keypoints of a dataset: their names, and which of them swap in a mirrored image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import ConfigError
from . import loading
from .catalog import FORMAT_KEY
from .check import Use
from .classes import list_of
from .report import Finding, shown

_KEYS = ("keypoint_names", "keypoint_flip_map")
# Datasets whose pairs of keypoints were not stated.
_pairs_by_name: set[str] = set()


def keypoint_metadata(name: str, stated: Any) -> dict:
    """The fourth item of an entry, checked."""
    where = f"{FORMAT_KEY}: keypoints of '{name}'"
    if not isinstance(stated, dict) or not set(stated) <= set(_KEYS):
        raise ConfigError(f"{where}: {shown(stated, 100)} must have {' or '.join(_KEYS)}")
    names, pairs = (stated.get(key, ()) for key in _KEYS)
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f"{where}: keypoint_names must be a list of names, not {shown(names, 60)}"
        )
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise ConfigError(
            f"{where}: keypoint_flip_map must be a list of pairs of names, not {shown(pairs, 60)}"
        )
    unknown = [n for pair in pairs for n in pair if n not in names] if names else []
    if unknown:
        raise ConfigError(f"{where}: keypoint_flip_map names {shown(unknown[0])}; valid: {names}")
    metadata: dict = {"keypoint_names": list(names)} if names else {}
    if "keypoint_flip_map" in stated:
        metadata["keypoint_flip_map"] = [tuple(pair) for pair in pairs]
    return metadata


def check_keypoint_names(cfg: CfgNode, name: str, use: Use, names: list[str]) -> Iterator[Finding]:
    """How many keypoints have names, which swap in a mirrored image, and the sigmas of evaluation.
    A dataset that states no names has those of the training set."""
    if len(names) != use.keypoints:
        found = f"there are {len(names)}: {list_of(names)}" if names else "there are none"
        yield Finding(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {use.keypoints}, but of keypoint names "
            f"{found}",
            f"state keypoint_names as fourth item of {FORMAT_KEY}, or in 'categories'",
            fatal=True,
        )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17  # pycocotools' own, of persons
    if use.test and sigmas != use.keypoints:
        yield Finding(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values for {use.keypoints} keypoints",
            "evaluation needs one for each, e.g. 0.05",
            fatal=True,
        )
    pairs = MetadataCatalog.get(name).get("keypoint_flip_map")
    if pairs is None or name in _pairs_by_name:
        _pairs_by_name.add(name)
        pairs = mirrored_pairs(names)
        if use.train and cfg.INPUT.RANDOM_FLIP == "horizontal":
            said = ", ".join(f"{a} and {b}" for a, b in pairs) or "no two"
            yield Finding(
                f"keypoints that swap in mirrored images: {said}",
                f"by their names; keypoint_flip_map of {FORMAT_KEY} states others",
            )
    loading.set_metadata(name, keypoint_names=names, keypoint_flip_map=pairs)


def mirrored_pairs(names: list[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in "left" and "right" only."""
    pairs = ((name, name.replace("left", "right")) for name in names if "left" in name)
    return [(left, right) for left, right in pairs if right in names]
