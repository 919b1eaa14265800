"""Angles between gradients, read from what trainings have logged."""

from __future__ import annotations

import json

import pytest

from d2kd import ConfigError
from d2kd.benchmark import angles


def write_metrics(folder, cosines):
    folder.mkdir()
    lines = [
        {"iteration": i, "balance/drkd/share": 0.5, "balance/drkd/cosine_dsig": cosine, "lr": 1}
        for i, cosine in enumerate(cosines)
    ]
    # A training that went on writes its last iterations twice.
    text = "".join(json.dumps(line) + "\n" for line in [*lines, lines[-1]])
    (folder / "metrics.json").write_text(text)
    return str(folder)


def test_means_of_runs(tmp_path, capsys):
    one = write_metrics(tmp_path / "one", [-0.4, 0.2])
    two = write_metrics(tmp_path / "two", [0.3])
    angles.main([one, two, "--json", str(tmp_path / "angles.json")])
    data = json.loads((tmp_path / "angles.json").read_text())
    assert data["runs"][0] == {"drkd": {"share": 0.5, "cosine_dsig": pytest.approx(-0.1)}}
    row = "| drkd   | 0.50 (0.50 to 0.50) | 0.10 (-0.10 to 0.30) |"
    assert row in capsys.readouterr().out and row in angles.markdown(data)


def test_a_killed_training(tmp_path):
    """Its last line may be cut off."""
    write_metrics(tmp_path / "one", [-0.4, 0.2])
    with (tmp_path / "one/metrics.json").open("a") as file:
        file.write('{"iteration": 7, "balance/dr')
    assert angles.measured(tmp_path / "one")["drkd"]["cosine_dsig"] == pytest.approx(-0.1)


def test_trainings_of_other_heads(tmp_path):
    one, two = (write_metrics(tmp_path / name, [0.1]) for name in ("one", "two"))
    text = (tmp_path / "two/metrics.json").read_text().replace("/drkd/", "/mar/")
    (tmp_path / "two/metrics.json").write_text(text)
    with pytest.raises(ConfigError, match=r"two is a training of mar, and .*one one of drkd: name"):
        angles.main([one, two])


def test_nothing_was_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics.json with measurements of DISTILL.BALANCE"):
        angles.main([str(tmp_path)])
