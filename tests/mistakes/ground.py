"""The folder in which mistakes are made: a training that would run, and files that are broken."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import torch
import torchvision
import yaml
from detectron2.config import get_cfg
from PIL import Image

from d2kd import add_distillation_config
from d2kd.engine.identity import changed_settings

from ..engine.children import CONFIG, write_job


class RunsCode:
    """Its pickle runs a command where it is read."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


# Config files that are none, or that say what no config can.
CONFIGS = {
    "empty": "",
    "list": "- a\n",
    "number": "5\n",
    "tab": "SOLVER:\n\tMAX_ITER: 3\n",
    "bracket": "SOLVER:\n  STEPS: [1, 2\n",
    "twice": "SEED: 1\nSEED: 2\n",
    "twice_below": "SOLVER:\n  MAX_ITER: 3\n  BASE_LR: 0.1\n  MAX_ITER: 4\n",
    "two_documents": "SEED: 1\n---\nSEED: 2\n",
    "tag": "MODEL:\n  WEIGHTS: !!python/object/apply:os.system ['touch PWNED']\n",
    "own_tag": "SEED: !me 3\n",
    "itself": "SOLVER: &a\n  STEPS: *a\n",
    "loop": "_BASE_: loop.yaml\n",
    "loop_of_two": "_BASE_: loop_back.yaml\n",
    "loop_back": "_BASE_: loop_of_two.yaml\n",
    "base_gone": "_BASE_: gone.yaml\n",
    "base_url": "_BASE_: https://x/y.yaml\n",
    "base_number": "SEED: 1\n_BASE_: 5\n",
    "base_empty": "_BASE_: empty.yaml\n",
    "base_folder": "_BASE_: images\n",
    "null_section": "DISTILL:\n",
    "null_heads": "DISTILL:\n  HEADS:\n",
    "null_inherit": "DISTILL:\n  INHERIT:\n",
    "null_train": "DATASETS:\n  TRAIN:\n",
    "null_coco": "DATASETS:\n  COCO_FORMAT:\n",
    "null_device": "MODEL:\n  DEVICE:\n",
    "null_iterations": "SOLVER:\n  MAX_ITER: ~\n",
    "null_output": "OUTPUT_DIR:\n",
    "unknown": "SOLVER:\n  MAX_ITERS: 3\n",
    "unknown_section": "SOLVERS:\n  MAX_ITER: 3\n",
    "key_number": "SOLVER:\n  5: 3\n",
    "key_list": "? [1, 2]\n: 3\n",
    "type": "SEED: 1\nSOLVER:\n  MAX_ITER: many\n",
    "section_is_number": "SOLVER: 5\n",
    "number_is_section": "SEED:\n  A: 1\n",
    "date": "OUTPUT_DIR: 2020-01-01\n",
}
# Suites that are none.
ARM = "{config: config.yaml}"
SUITES = {
    "no_arms": "baseline: a\nseeds: [1]\n",
    "arms_list": "baseline: a\nseeds: [1]\narms: [a]\n",
    "no_config": "baseline: a\nseeds: [1]\narms:\n  a: {opts: {}}\n",
    "config_number": "baseline: a\nseeds: [1]\narms:\n  a: {config: 5}\n",
    "config_gone": "baseline: a\nseeds: [1]\narms:\n  a: {config: gone.yaml}\n",
    "baseline": f"baseline: b\nseeds: [1]\narms:\n  a: {ARM}\n",
    "seeds_words": f"baseline: a\nseeds: [one]\narms:\n  a: {ARM}\n",
    "seeds_negative": f"baseline: a\nseeds: [-1]\narms:\n  a: {ARM}\n",
    "unknown_key": f"baseline: a\nseeds: [1]\narmes: {{}}\narms:\n  a: {ARM}\n",
    "arm_key": "baseline: a\nseeds: [1]\narms:\n  a: {config: config.yaml, opt: {}}\n",
    "arm_number": "baseline: a\nseeds: [1]\narms:\n  a: 5\n",
    "twice": f"baseline: a\nseeds: [1]\narms:\n  a: {ARM}\n  a: {ARM}\n",
    "times_zero": "baseline: a\nseeds: [1]\narms:\n  a: {config: config.yaml, times: 0}\n",
    "opts_unknown": "baseline: a\nseeds: [1]\nopts: {SOLVER.ITER: 3}\narms:\n  a: " + ARM + "\n",
    "same_folder": f"baseline: a b\nseeds: [1]\narms:\n  a b: {ARM}\n  a*b: {ARM}\n",
    "same_time": "baseline: a\nseeds: [1]\narms:\n  a: " + ARM + "\n"
    "  b: {config: config.yaml, same_time_as: c}\n",
    "teacher": "teacher: {config: gone.yaml}\nbaseline: a\nseeds: [1]\narms:\n  a: " + ARM + "\n",
}


def make_ground(folder: Path) -> Path:
    """Write everything into ``folder``, and return it."""
    write_job(folder)
    for name in (CONFIG, "teacher.yaml"):
        _shorten(folder / name)
    _write_configs(folder)
    _write_checkpoints(folder)
    _write_data(folder)
    (folder / "file").write_text("a file\n")
    (folder / "link").symlink_to("nowhere")
    (folder / "modules").mkdir()
    (folder / "modules" / "syntax.py").write_text("import os\ndef f(:\n")
    (folder / "modules" / "raises.py").write_text("import json\njson.loads('{')\n")
    (folder / "modules" / "needs.py").write_text("import no_such_module_at_all\n")
    return folder


def _shorten(path: Path) -> None:
    """Leave what is not default of a config: reading all of it takes a tenth of a second."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(path))
    content: dict = {"VERSION": 2}
    for key, value in changed_settings(cfg).items():
        *parents, name = key.split(".")
        node = content
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    path.write_text(yaml.safe_dump(content))


def _write_configs(folder: Path) -> None:
    configs = folder / "configs"
    configs.mkdir()
    for name, text in CONFIGS.items():
        (configs / f"{name}.yaml").write_text(text)
    (configs / "binary.yaml").write_bytes(b"\x80\x81\x82" * 50)
    (configs / "zeros.yaml").write_bytes(bytes(100))
    (configs / "utf16.yaml").write_bytes("SEED: 1\n".encode("utf-16"))
    suites = folder / "suites"
    suites.mkdir()
    for name, text in SUITES.items():
        (suites / f"{name}.yaml").write_text(text)


def _write_checkpoints(folder: Path) -> None:
    weights = folder / "weights"
    weights.mkdir()
    whole = (folder / "start.pth").read_bytes()
    (weights / "empty.pth").write_bytes(b"")
    (weights / "text.pth").write_text("no checkpoint\n")
    (weights / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (weights / "text.pkl").write_text("no pickle\n")
    torch.save({"model": {"x": torch.zeros(3)}}, weights / "other.pth")
    torch.save([1, 2], weights / "list.pth")
    torch.save({"model": [1, 2]}, weights / "model_is_list.pth")
    torch.save({1: torch.zeros(2)}, weights / "numbers.pth")
    torch.save({"model": {"backbone.fpn_lateral2.weight": "text"}}, weights / "values.pth")
    for name in ("code.pkl", "code.pth"):
        content = {"model": {"x": RunsCode()}, "__author__": "me"}
        with (weights / name).open("wb") as file:
            pickle.dump(content, file) if name.endswith("pkl") else torch.save(content, file)
    with torch.device("meta"):
        resnet = torchvision.models.resnet18().state_dict()
    # Of one element each, whatever their shapes.
    resnet = {name: torch.zeros(()).expand(value.shape) for name, value in resnet.items()}
    resnet["layer1.0.conv1.weight"] = torch.zeros(3, 64, 3, 3)
    torch.save(resnet, weights / "resnet.pth")
    for name, last in (("gone", "model_0000099.pth"), ("cut", "cut.pth"), ("nothing", "")):
        output = folder / f"resume_{name}"
        output.mkdir()
        (output / "last_checkpoint").write_text(last)
        (output / "cut.pth").write_bytes(whole[:1000])
    for name, text in (("demo", "{"), ("list", "[]")):
        (folder / name).mkdir()
        (folder / name / "settings.json").write_text(text)
    (folder / "results").mkdir()
    (folder / "results" / "results.jsonl").write_text('{"a": 1}\n')


def _write_data(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    content = json.loads((folder / "annotations.json").read_text())

    def save(name: str, **changes) -> None:
        text = json.dumps({**content, **changes})
        (data / f"{name}.json").write_text(text)

    def each(**values) -> list[dict]:
        return [{**entry, **values} for entry in content["annotations"]]

    save("negative", annotations=each(bbox=[50, 50, -20, -20]))
    save("nan", annotations=each(bbox=[float("nan"), 1, 2, 3]))
    save("category", annotations=each(category_id=99))
    save("crowd", annotations=each(iscrowd=1))
    save("small", annotations=each(bbox=[9, 9, 12, 12]))
    save("names", categories=[{"id": n + 1, "name": f"other {n}"} for n in range(3)])
    save("gone", images=[{**image, "file_name": "gone.png"} for image in content["images"]])
    save(
        "climbs",
        images=[
            {**image, "file_name": f"../images/../data/{image['file_name']}"}
            for image in content["images"]
        ],
    )
    (data / "text.json").write_text("no JSON\n")
    (data / "list.json").write_text("[]\n")
    for image in content["images"]:
        Image.new("L", (8, 8)).save(data / image["file_name"])
    clone = folder / "clone"
    (clone / "BCCD" / "ImageSets" / "Main").mkdir(parents=True)
    (clone / "BCCD" / "ImageSets" / "Main" / "train.txt").write_text("../../../../file\n")


CONFIG_FILE = f"--config-file {CONFIG}"
