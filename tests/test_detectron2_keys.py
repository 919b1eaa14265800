"""Each config key that Detectron2's trainer, loader, evaluators and solver read is honoured or
refused: their source is searched for keys, and each function that reads some stands in a table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import detectron2
import pytest

from d2kd import ConfigError
from d2kd.config_rules import check_detectron2_keys

from .detectors import detector_config

PACKAGE = Path(__file__).parents[1] / "d2kd"
DETECTRON2 = Path(detectron2.__file__).parent
SEARCHED = ("engine", "data", "evaluation", "solver", "checkpoint", "modeling/meta_arch/build.py")
SEARCHED += ("modeling/test_time_augmentation.py",)

# Function of Detectron2 that reads keys -> what of d2kd's source calls it.
CALLED = {
    "DefaultTrainer.auto_scale_workers": "DefaultTrainer.auto_scale_workers(cfg",
    "DefaultTrainer.build_hooks": "super().build_hooks()",
    "DefaultTrainer.test": "super().test(cfg, model",
    "verify_results": "verify_results(self.cfg",
    "_test_loader_from_config": "build_detection_test_loader(",
    "DatasetMapper.from_config": "DatasetMapper(cfg, True)",
    "build_augmentation": "DatasetMapper(cfg, True)",
    "build_optimizer": "super().build_optimizer(cfg",
    "maybe_add_gradient_clipping": "maybe_add_gradient_clipping(cfg",
    "_create_gradient_clipper": "maybe_add_gradient_clipping(cfg",
    "build_lr_scheduler": "self.build_lr_scheduler(cfg",
    "build_model": "build_model(cfg)",
}
# In whose place d2kd has its own: it reads their keys itself, or refuses them.
REPLACED = {
    "default_setup",
    "DefaultTrainer.__init__",
    "DefaultTrainer.resume_or_load",
    "DefaultTrainer.build_writers",
    "DefaultTrainer.train",
    "_train_loader_from_config",
    "_build_weighted_sampler",
    "_get_train_datasets_repeat_factors",
    "DatasetMapperTTA.from_config",
}
# What no training or evaluation calls: a predictor, and the model of TEST.AUG.
ELSEWHERE = {
    "DefaultPredictor.__init__",
    "DefaultPredictor.__call__",
    "GeneralizedRCNNWithTTA.__init__",
    "GeneralizedRCNNWithTTA._inference_one_image",
    "GeneralizedRCNNWithTTA._merge_detections",
}

PROPOSALS, AUGMENTATION = ("MODEL.LOAD_PROPOSALS", True), ("TEST.AUG.ENABLED", True)
SUBSET = ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
WEIGHTED = ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler")
# Key -> the key and value without which it has no meaning, which are refused.
REFUSED = {
    "MODEL.LOAD_PROPOSALS": PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TRAIN": PROPOSALS,
    "DATASETS.PROPOSAL_FILES_TEST": PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": PROPOSALS,
    "DATALOADER.RANDOM_SUBSET_RATIO": SUBSET,
    "DATASETS.TRAIN_REPEAT_FACTOR": WEIGHTED,
    "TEST.AUG.MIN_SIZES": AUGMENTATION,
    "TEST.AUG.MAX_SIZE": AUGMENTATION,
    "TEST.AUG.FLIP": AUGMENTATION,
}


def sources(*paths: Path) -> list[str]:
    files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return [file.read_text() for file in files]


def keys_in(text: str) -> Iterator[tuple[str, str]]:
    """(function, key) of all that a module reads of a ``cfg``, as ``cfg.A.B`` or by
    ``_try_get_key(cfg, "A.B")``."""

    def visit(node: ast.AST, where: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            where = (*where, node.name)
        found = [_key_of(node)] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_try_get_key":
            found = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        found = [key for key in found if key and key == key.upper()]
        yield from ((".".join(where[:2]), key) for key in found)
        if not found or isinstance(node, ast.Call):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, where)

    yield from visit(ast.parse(text), ())


def _key_of(node: ast.AST) -> str:
    """ "A.B" of ``cfg.A.B`` and ``self.cfg.A.B``; "" of other expressions."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if getattr(node, "id", "") == "self":
        names.insert(0, names.pop(0))
    elif getattr(node, "id", "") == "cfg":
        names.insert(0, "cfg")
    if not names or names[0] != "cfg":
        return ""
    path = names[1:]
    while path and path[-1] != path[-1].upper():  # a method of the value
        path.pop()
    return ".".join(path)


@pytest.fixture(scope="module")
def read_by() -> dict[str, set[str]]:
    """Function of Detectron2 -> keys that it reads."""
    found: dict[str, set[str]] = {}
    for text in sources(*(DETECTRON2 / path for path in SEARCHED)):
        for function, key in keys_in(text):
            found.setdefault(function.removesuffix(".clip_grad_norm"), set()).add(key)
    return found


def test_every_function_that_reads_keys_is_known(read_by):
    """One that a newer Detectron2 brings is seen here; those of the table are there."""
    known = {*CALLED, *REPLACED, *ELSEWHERE}
    names = {name.removesuffix(".clip_grad_value") for name in read_by}
    assert names - known == set()
    assert len(names) >= 20 and "DefaultTrainer.build_hooks" in names


def test_what_is_called_is_called(read_by):
    """The calls that CALLED names stand in d2kd's source."""
    text = "\n".join(sources(PACKAGE))
    assert [call for call in CALLED.values() if call not in text] == []


def test_every_key_is_honoured_or_refused(read_by):
    """By a function of Detectron2's that d2kd calls, by d2kd itself, or in one line."""
    honoured = set().union(*(read_by.get(name, set()) for name in CALLED))
    honoured |= {key for text in sources(PACKAGE) for _, key in keys_in(text)}
    assert {"SEED", "CUDNN_BENCHMARK", "TEST.PRECISE_BN.ENABLED", "SOLVER.NESTEROV"} <= honoured
    every = set().union(*(keys for name, keys in read_by.items() if name not in ELSEWHERE))
    assert sorted(every - honoured - REFUSED.keys()) == []


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys(key):
    """The line names the key that is set, and what is valid."""
    cfg = detector_config()
    cfg.DATASETS.TRAIN = ("digits_tiny_train",)
    name, value = REFUSED[key]
    cfg.merge_from_list([name, value])
    with pytest.raises(ConfigError, match=f"^{name} is .*valid: "):
        check_detectron2_keys(cfg)
