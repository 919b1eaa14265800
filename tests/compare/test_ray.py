"""d2kd compare --ray: a suite on a local cluster of two nodes, failures, and how it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2kd import ConfigError, cli
from d2kd.compare import processes, ray_processes, tables

from ..detectors import detector_config, write_config

needs_ray = "Ray is not installed: pip install 'd2kd[ray]'"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes on this machine, of one CPU each; the second has what Ray takes for a GPU."""
    ray = pytest.importorskip("ray", reason=needs_ray)
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def disconnected(cluster):
    """The address of the cluster, to which this process connects itself."""
    import ray

    yield cluster
    ray.shutdown()


def stage(name: str, folder: Path, code: str) -> tuple[str, list[str], Path, Path, int]:
    """Arguments of ``run_stage`` for a program that stands for a training."""
    (folder / name).mkdir(parents=True)
    return name, ["-c", code], folder / name / "results.json", folder / "logs", 1


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(process: int) -> bool:
    """Whether there is such a process, and it has not ended as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_suite_on_two_nodes(tmp_path, digits_root, disconnected, monkeypatch, capsys):
    """Real trainings: the results are those of this machine's own pool, and are kept."""
    monkeypatch.chdir(tmp_path)
    config = detector_config(num_classes=10)
    config.DATASETS.TRAIN, config.DATASETS.TEST = ("digits_tiny_train",), ("digits_tiny_val",)
    config.SOLVER.MAX_ITER = 1
    del config.DISTILL["TOY_MIMIC"]  # the trainings do not know it
    write_config(config, tmp_path / "student.yaml")
    (tmp_path / "suite.yaml").write_text(
        "baseline: alone\nseeds: [1]\n"
        "arms:\n  alone: {config: student.yaml}\n  longer: {config: student.yaml, times: 2}\n"
    )
    command = ["compare", "--suite", "suite.yaml", "--output"]
    cli.main([*command, "remote", "--ray", disconnected])
    assert capsys.readouterr().out.count(": on ") == 2
    cli.main([*command, "local", "--jobs", "2"])
    remote = tables.read_lines(Path("remote/results.jsonl"))
    local = tables.read_lines(Path("local/results.jsonl"))
    assert [line["iterations"] for line in remote] == [1, 2]
    for ours, theirs in zip(remote, local, strict=True):
        assert ours.keys() == theirs.keys()
        assert json.dumps(ours["results"]) == json.dumps(theirs["results"])
    written = (tmp_path / "remote/results.jsonl").read_text()
    capsys.readouterr()
    cli.main([*command, "remote", "--ray", disconnected])
    assert capsys.readouterr().out.count("done before") == 2
    assert (tmp_path / "remote/results.jsonl").read_text() == written


def test_stages_are_spread_and_failures_named(tmp_path, disconnected, monkeypatch, capsys):
    """Two run at a time, on a node each, in the working directory; of one that fails the last line
    is told; its machine takes the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    running = ray_processes.RayProcesses(disconnected, threads=1)
    assert running.room == 2
    # Each waits for the other: they run at the same time, or never end.
    code = (
        "import json, os, time\n"
        "open('{name}.here', 'w')\n"
        "while not os.path.exists('{other}.here'): time.sleep(0.1)\n"
        "print('eta: 1  iter: 7  total_loss: 2', flush=True)\n"
        "keys = 'RAY_RAYLET_PID', 'OMP_NUM_THREADS', 'DETECTRON2_DATASETS'\n"
        "json.dump([os.environ[key] for key in keys], open('{name}/results.json', 'w'))\n"
    )
    tasks = [
        stage(name, tmp_path, code.format(name=name, other=other))
        for name, other in (("a", "b"), ("b", "a"))
    ]
    tasks += [stage("bad", tmp_path, "print('oh no'); raise SystemExit(1)")]
    failed = processes.run_in_order(
        tasks, lambda task: running.run_stage(*task), jobs=2, processes=running
    )
    ((task, why),) = failed
    assert task[0] == "bad" and why.startswith("bad failed (oh no); its output is in ")
    assert (tmp_path / "logs/bad.log").read_text() == "oh no\n"
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert found[0][0] != found[1][0] and found[0][1:] == found[1][1:] == ["1", "elsewhere"]
    assert "  a: iteration 7, loss 2, 1 to go" in capsys.readouterr().out


def test_files_that_are_not_shared(tmp_path, disconnected, monkeypatch):
    """What a machine writes where the others do not see it is a failed run, in plain words."""
    monkeypatch.setattr(ray_processes, "_SEEN_WITHIN", 0.1)
    running = ray_processes.RayProcesses(disconnected, threads=1)
    name, command, done, logs, threads = stage("hides", tmp_path, "")
    command[1] = f"open({str(done)!r}, 'w')"
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match=f"does not see {gone}: the machines of the cluster need"):
        running.run_stage(name, command, gone / done.name, logs, threads)
    assert not gone.exists() and not done.exists()
    monkeypatch.setattr(ray_processes, "_is_seen", lambda *_: False)  # here, not there
    with pytest.raises(ConfigError, match=f"{done} of another machine is not visible here"):
        running.run_stage(name, command, done, logs, threads)
    assert done.exists()


def test_a_machine_that_fails(tmp_path, disconnected):
    """A training ends with the worker of Ray's that has started it; the run has failed, in a line,
    and the next one finds a machine."""
    running = ray_processes.RayProcesses(disconnected, threads=1)
    name, command, done, logs, threads = stage("orphan", tmp_path, "")
    pid = tmp_path / "pid"
    command[1] = (
        f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()));"
        "print('eta: 1  iter: 1  total_loss: 1', flush=True);"
        "os.kill(os.getppid(), 9); time.sleep(600)"
    )
    with pytest.raises(ConfigError, match="orphan failed .The actor died unexpectedly") as error:
        running.run_stage(name, command, done, logs, threads)
    assert "\n" not in str(error.value)
    wait_for(lambda: not is_running(int(pid.read_text())))
    running.run_stage(name, ["-c", f"open({str(done)!r}, 'w')"], done, logs, threads)


DRIVER = """
import sys
from pathlib import Path
from d2kd.cli import end_in_one_line
from d2kd.compare import processes, ray_processes
address, folder = sys.argv[1], Path(sys.argv[2])
def main():
    running = ray_processes.RayProcesses(address, 1)
    code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(600)"
    def work(name):
        command = ["-c", code, str(folder / f"{name}.pid")]
        running.run_stage(name, command, folder / name / "results.json", folder / "logs", 1)
    for name in "abc":
        (folder / name).mkdir()
    with processes.stopping_by_sigterm("stopped by test"):
        processes.run_in_order("abc", work, jobs=3, processes=running)
end_in_one_line(main)
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_training_outlives_the_command(tmp_path, cluster, by):
    """Ctrl-C ends what runs on the cluster and what waits for room there; so does any other end."""
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
    )
    files = [tmp_path / f"{name}.pid" for name in "abc"]

    def started() -> list[int]:
        return [int(file.read_text()) for file in files if file.exists() and file.read_text()]

    try:
        wait_for(lambda: len(started()) == 2)  # the third waits for room
        trainings = started()
        assert all(map(is_running, trainings))
        driver.send_signal(by)
        _, told = driver.communicate(timeout=60)
    finally:
        driver.kill()
    if by != signal.SIGKILL:
        assert driver.returncode == cli.INTERRUPTED and told.splitlines()[-1] == "stopped by test"
    wait_for(lambda: not any(map(is_running, trainings)), 0 if by != signal.SIGKILL else 60)
    assert started() == trainings


def test_a_gpu_each(tmp_path, cluster):
    """Where a cluster has GPUs, a run has one of them to itself."""
    ray = pytest.importorskip("ray", reason=needs_ray)
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2})
    try:
        running = ray_processes.RayProcesses(nodes.address, threads=8)
        assert running.room == 2
        tasks = []
        for name in "ab":
            task = stage(name, tmp_path, "")
            task[1][1] = (
                "import os, time; seen = os.environ['CUDA_VISIBLE_DEVICES']; time.sleep(3);"
                f"open({str(task[2])!r}, 'w').write(seen)"
            )
            tasks.append(task)
        processes.run_in_order(
            tasks, lambda task: running.run_stage(*task), jobs=2, processes=running
        )
        assert {task[2].read_text() for task in tasks} == {"0", "1"}
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.mark.parametrize(
    "address, message",
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no cluster ([Errno 111] Connection refused)"),
        ("nonsense", "--ray nonsense: an address is HOST:PORT"),
    ],
)
def test_no_cluster(tmp_path, monkeypatch, address, message):
    """It is said in one line, before anything is written."""
    pytest.importorskip("ray", reason=needs_ray)
    refused(tmp_path, monkeypatch, ["--ray", address], message)
    monkeypatch.setenv("RAY_ADDRESS", address)
    refused(tmp_path, monkeypatch, ["--ray"], message)


def test_without_ray(tmp_path, monkeypatch):
    """Only --ray imports Ray; where it is missing, the command that installs it is named."""
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(tmp_path, monkeypatch, ["--ray"], "Ray is not installed: pip install 'd2kd[ray]'")
    code = "import sys, d2kd.compare.command; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_threads_than_a_machine_has(tmp_path, monkeypatch, disconnected):
    """No run would ever start."""
    options = ["--ray", disconnected, "--threads", "2"]
    message = "--threads 2: no machine of the Ray cluster has more than 1 CPUs"
    refused(tmp_path, monkeypatch, options, message)


def refused(tmp_path, monkeypatch, options: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--configs", "digits/retinanet_R18.yaml", *options])
    assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())
