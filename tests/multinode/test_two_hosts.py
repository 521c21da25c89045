"""finetune.py on two hosts, with the commands of docs/guide/multi_node.md."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from finetune_runs import assert_same_bits, command, finetune_succeeds, stored_entries, write_tokens
from megatron.training.sinks import read_metrics
from network_namespaces import torchrun_on_two_hosts, two_hosts, why_not

REASON = why_not()
pytestmark = [pytest.mark.multinode, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

NUM_STEPS = 4
# Tensor ranks are neighbours in the order of ranks, so they share a host; the two stages are one on each.
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "train_iters": NUM_STEPS}


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def test_training_on_two_hosts_is_bitwise_training_on_one(tmp_path: Path) -> None:
    """Every sum is over the same ranks in the same order; only the wire between them is another one."""
    data = write_tokens(tmp_path / "counting")
    with two_hosts() as hosts:
        script = ["finetune.py", *command(data, save=tmp_path / "two", **LAYOUT)]
        endings = torchrun_on_two_hosts(hosts, script, tmp_path, nproc_per_node=2, timeout_s=240)
    assert [status for status, _ in endings] == [0, 0], "\n".join(output for _, output in endings)
    assert "TP2 x PP2 x DP1" in endings[0][1]
    finetune_succeeds(4, command(data, save=tmp_path / "one", **LAYOUT))

    one, two = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    for figure in ("lm_loss", "grad_norm", "learning_rate", "consumed_samples"):
        values = [line[figure] for line in two if figure in line]
        assert len(values) == NUM_STEPS
        assert values == [line[figure] for line in one if figure in line], figure
    assert_same_bits(stored_entries(tmp_path / "two"), stored_entries(tmp_path / "one"))


def test_hosts_vanish_with_their_processes_when_a_test_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), two_hosts() as hosts:
        sleeper = hosts[1].start(["sleep", "600"], {}, tmp_path / "log")
        assert {host.namespace for host in hosts} <= set(namespaces())
        raise ZeroDivisionError
    assert sleeper.wait(timeout=10) != 0
    assert not {host.namespace for host in hosts} & set(namespaces())


def test_the_hosts_are_joined_to_each_other_and_to_nothing_else() -> None:
    with two_hosts() as hosts:
        for host in hosts:
            listed = subprocess.run(["ip", "-n", host.namespace, "route"], check=True, capture_output=True, text=True)
            assert [route.split()[0] for route in listed.stdout.splitlines()] == ["198.18.0.0/30"]
