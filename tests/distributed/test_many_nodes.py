"""Runs over several machines, played on one: rendezvous of two agents, DeepSpeed's hostfile, SLURM's job script.

Every process sees one core: how many threads a rank has depends on the ranks of its machine, and sums on the threads.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from omnisieve.config import TrainConfig, load_config
from tests.distributed.programs import (
    ENDLESS,
    ROOT,
    arguments,
    assert_complete,
    finish,
    free_port,
    largest_difference,
    last_checkpoint,
    last_logged,
    lasting_log,
    start,
    start_two_ranks,
    wait_for_step,
)

# Stands for pdsh: runs the command, with %n replaced, for every host on this one.
PDSH = """#!/bin/bash
while [ "$1" != -w ]; do shift; done
hosts=${2//,/ }; shift 2
node=0
for host in $hosts; do
    echo "$host: ${*//%n/$node}"
    bash -c "${*//%n/$node}" &
    node=$((node + 1))
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""


@pytest.fixture(scope="module")
def one_node(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks of one machine."""
    folder = tmp_path_factory.mktemp("one") / "run"
    for status, output in map(finish, start_two_ranks(*arguments(clips, folder), core_each=True)):
        assert status == 0, output
    return folder


def assert_equal(run: Path, other: Path) -> None:
    assert_complete(run, 2)
    assert largest_difference(run, other) == 0
    assert lasting_log(run) == lasting_log(other)


def start_two_agents(*words: str) -> list[subprocess.Popen[str]]:
    meeting = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "run")
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    return [start([*agent, "train.py", *words], core=node) for node in range(2)]


@pytest.mark.slow
def test_two_agents_meet_and_train_as_one_machine_does(clips: Path, tmp_path: Path, one_node: Path):
    for status, output in map(finish, start_two_agents(*arguments(clips, tmp_path / "run"))):
        assert status == 0, output
    assert_equal(tmp_path / "run", one_node)


@pytest.mark.slow
def test_sigterm_to_both_agents_leaves_a_checkpoint(clips: Path, tmp_path: Path):
    agents = start_two_agents(*arguments(clips, tmp_path / "run", *ENDLESS))
    wait_for_step(tmp_path / "run", 1, *agents)
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    output = "".join(output for _, output in map(finish, agents))
    assert "ended on request" in output, output
    assert last_checkpoint(tmp_path / "run") == last_logged(tmp_path / "run") < 1000


def hostfile_command(tmp_path: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """A command line that starts `train.py` on two hosts of one rank each, and the environment with our pdsh."""
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pdsh").write_text(PDSH)
    (tools / "pdsh").chmod(0o755)
    options = ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--master_port", free_port()]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--no_ssh_check", "train.py", *words]
    return command, {"PATH": os.pathsep.join([str(tools), os.environ["PATH"]])}


@pytest.mark.slow
def test_a_hostfile_starts_what_one_machine_starts(clips: Path, tmp_path: Path, one_node: Path):
    words = arguments(clips, tmp_path / "run")
    command, environment = hostfile_command(tmp_path, *words)
    status, output = finish(start(command, core=0, **environment))
    assert status == 0, output
    for rank, host in enumerate(("node-a", "node-b")):
        (line,) = (line for line in output.splitlines() if line.startswith(f"{host}: "))
        sent = shlex.split(line)
        assert "deepspeed.launcher.launch" in sent
        assert f"--node_rank={rank}" in sent
        assert sent[sent.index("train.py") :] == ["train.py", *words]
    assert_equal(tmp_path / "run", one_node)


def test_the_job_script_of_the_docs_is_a_script_whose_command_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, flags=re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = shlex.split(script.replace("\\\n", " "), comments=True)
    assert load_config(TrainConfig, words[words.index("train.py") + 1 : words.index("status=$?")])


def test_every_command_of_the_docs_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in page.splitlines() if line.startswith("    ") and "train.py" in line]
    assert len(lines) > 3
    for line in lines:
        words = shlex.split(line, comments=True)
        assert load_config(TrainConfig, words[words.index("train.py") + 1 :])
