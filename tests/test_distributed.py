"""Set-up and collectives, alone and in two real gloo processes started by torchrun.

The two-process tests share one start: this file is also the program that torchrun runs.
"""

import fcntl
import os
import pty
import socket
import subprocess
import sys
import termios
from datetime import timedelta
from pathlib import Path

import forked
import pytest
import torch
from torch import nn

from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError

K = 33


def batch_norms(rank):
    """Two layers that have seen the rank's own batch; the counters differ between ranks."""
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm1d(6)]
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(1 + rank):
        modules[0](torch.randn(5, 3, 2, 2, generator=generator))
        modules[1](torch.randn(5, 6, generator=generator))
    modules[0].register_buffer("other", torch.full((2,), float(rank)))
    return modules


def teacher_logits(rank, step):
    return torch.randn(8, K, generator=torch.Generator().manual_seed(10 * step + rank))


def rows(rank, dtype):
    """3 rows on rank 0, none on rank 1."""
    return torch.arange(6).view(3, 2)[: 3 * (1 - rank)].to(dtype)


def worker(folder):
    ranks = distributed.setup("cpu", timeout_s=60)
    loss = DINOLoss(K)
    for step in range(3):
        mean = teacher_logits(ranks.rank, step).mean(0, keepdim=True)
        loss.update_center(distributed.all_reduce_mean(mean))
    modules = batch_norms(ranks.rank)
    distributed.all_reduce_buffers(modules)
    features = torch.full((2 + ranks.rank, 3), float(ranks.rank))
    distributed.barrier()
    results = {
        "ranks": (ranks.rank, ranks.world_size, ranks.local_rank, str(ranks.device)),
        "center": loss.center,
        "buffers": [dict(module.named_buffers()) for module in modules],
        "features": distributed.gather_variable(features),
        "labels": distributed.gather_variable(rows(ranks.rank, torch.int64)),
        "flat": distributed.gather_variable(torch.arange(ranks.rank, 3)),
    }
    torch.save(results, Path(folder) / f"{ranks.rank}.pt")
    distributed.teardown()
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", __file__, str(folder)]
    environment = {k: v for k, v in os.environ.items() if not names_a_launcher(k)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def names_a_launcher(name):
    return name in distributed.TORCHRUN or name.startswith(("SLURM_", "SUBMITIT_", "LOCAL_WORLD"))


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in filter(names_a_launcher, list(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


def test_torchrun_gives_each_process_its_rank_on_the_cpu(two_processes):
    assert [r["ranks"] for r in two_processes] == [(0, 2, 0, "cpu"), (1, 2, 1, "cpu")]


def test_the_centre_of_two_processes_is_that_of_one_with_both_batches(two_processes):
    loss = DINOLoss(K)
    for step in range(3):
        both = torch.cat([teacher_logits(rank, step) for rank in range(2)])
        loss.update_center(both.mean(0, keepdim=True))
    assert torch.equal(two_processes[0]["center"], two_processes[1]["center"])
    torch.testing.assert_close(two_processes[0]["center"], loss.center, rtol=1e-5, atol=1e-7)


def test_running_statistics_become_the_mean_over_ranks_and_nothing_else_moves(two_processes):
    own = [[dict(m.named_buffers()) for m in batch_norms(rank)] for rank in range(2)]
    averaged = 0
    for module in range(2):
        for name in own[0][module]:
            got = [two_processes[rank]["buffers"][module][name] for rank in range(2)]
            mine = [own[rank][module][name] for rank in range(2)]
            if "running" in name:
                averaged += 1
                assert not torch.equal(mine[0], mine[1])
                assert torch.equal(got[0], got[1]), name
                torch.testing.assert_close(got[0], (mine[0] + mine[1]) / 2)
            else:
                assert torch.equal(got[0], mine[0]), name
                assert torch.equal(got[1], mine[1]), name
    assert averaged == 4
    assert own[0][0]["1.num_batches_tracked"] != own[1][0]["1.num_batches_tracked"]


def test_gathering_joins_the_rows_of_all_ranks_in_rank_order_also_from_an_empty_one(two_processes):
    for results in two_processes:
        assert results["features"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 3
        assert torch.equal(results["labels"], rows(0, torch.int64))
        assert results["flat"].tolist() == [0, 1, 2, 1, 2]


def test_alone_there_is_no_process_group_and_collectives_change_nothing(alone):
    ranks = distributed.setup("cpu")
    assert ranks == distributed.Distributed(0, 1, 0, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    tensor = torch.randn(3)
    assert distributed.all_reduce_mean(tensor) is tensor
    assert distributed.gather_variable(tensor) is tensor
    modules = batch_norms(1)
    before = [b.clone() for m in modules for b in m.buffers()]
    distributed.all_reduce_buffers(modules)
    assert all(map(torch.equal, before, (b for m in modules for b in m.buffers())))
    distributed.barrier()
    distributed.teardown()


def test_one_process_under_torchrun_needs_no_group_either(alone):
    values = ("0", "1", "0", "localhost", "29501")
    for name, value in zip(distributed.TORCHRUN, values, strict=True):
        alone.setenv(name, value)
    assert distributed.setup("cpu").world_size == 1
    assert not torch.distributed.is_initialized()


def test_an_incomplete_environment_names_what_is_missing(alone):
    alone.setenv("RANK", "1")
    alone.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing") as error:
        distributed.setup("cpu")
    assert "\n" not in str(error.value)


def test_a_master_address_in_the_environment_does_not_make_a_run_distributed(alone):
    alone.setenv("MASTER_ADDR", "localhost")
    assert distributed.setup("cpu").world_size == 1


def test_waiting_for_a_rank_that_never_comes_ends_with_the_timeout(alone):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    values = ("0", "2", "0", "localhost", port)
    for name, value in zip(distributed.TORCHRUN, values, strict=True):
        alone.setenv(name, value)
    with pytest.raises(UserError, match=rf"waited 1 s in vain for rank 1 of 2 at localhost:{port}"):
        distributed.setup("cpu", timeout_s=1.0)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "expected", "backend"),
    [("cpu", "cpu", "gloo"), ("cuda", "cuda:1", "cpu:gloo,cuda:nccl")],
)
def test_a_rank_of_a_second_machine_takes_its_device_by_its_local_rank(
    alone, device, expected, backend
):
    joined, current = [], []
    alone.setattr(
        torch.distributed,
        "init_process_group",
        lambda *args, **kwargs: joined.append((args, kwargs)),
    )
    alone.setattr(distributed.rendezvous, "meet", lambda *place: place[:4])
    alone.setattr(torch.cuda, "set_device", current.append)
    with_gpus(alone, 4)
    values = ("5", "8", "1", "localhost", "29501")
    for name, value in zip(distributed.TORCHRUN, values, strict=True):
        alone.setenv(name, value)
    ranks = distributed.setup(device, timeout_s=90.0)
    assert ranks == distributed.Distributed(5, 8, 1, torch.device(expected))
    on_gpu = [ranks.device] if device == "cuda" else []
    [(arguments, options)] = joined
    assert arguments == (backend,)
    assert options == {
        "store": ("localhost", 29501, 5, 8),
        "timeout": timedelta(seconds=90),
        "rank": 5,
        "world_size": 8,
        "device_id": ranks.device if on_gpu else None,
    }
    assert current == on_gpu


# Variables as SLURM 22.05 and submitit 1.5.4 set them (copied from `srun env`)
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29501",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "4711",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no launcher", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (STEP, ("SLURM", 6, 7, 1, 2)),
        (STEP | {"SUBMITIT_EXECUTOR": "slurm"}, ("submitit", 6, 7, 1, 2)),
        (LOCAL, ("submitit", 1, 2, 1, 2)),
        (STEP | {"SUBMITIT_EXECUTOR": "slurm"} | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        # a batch script, and a shell of salloc, are one process whatever the job's size
        ({k: v for k, v in STEP.items() if "STEP" not in k}, ("no launcher", 0, 1, 0, 1)),
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "7"}, ("no launcher", 0, 1, 0, 1)),
    ],
)
def test_the_launcher_is_told_by_its_variables(environment, expected):
    place = distributed.find_place(environment)
    found = (place.launcher, place.rank, place.world_size, place.local_rank, place.local_world_size)
    assert found == expected


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (TORCHRUN | {"RANK": "abc"}, r"RANK must be an integer in \[0, 7\], got abc: start with"),
        (TORCHRUN | {"RANK": "8"}, r"RANK must be an integer in \[0, 7\], got 8"),
        (TORCHRUN | {"RANK": "-1"}, r"RANK must be an integer in \[0, 7\], got -1"),
        (TORCHRUN | {"RANK": ""}, "RANK missing"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer >= 1, got 0"),
        (TORCHRUN | {"MASTER_PORT": "http"}, r"MASTER_PORT must be an integer in \[1, 65535\]"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4.0"}, "LOCAL_WORLD_SIZE must be .* got 4.0"),
        (
            {k: v for k, v in STEP.items() if k != "SLURM_STEP_TASKS_PER_NODE"},
            "SLURM_STEP_TASKS_PER_NODE missing: start with srun, or unset SLURM_STEP_ID",
        ),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "many"}, r"must have the sum .*\(7\), got many"),
        (STEP | {"SLURM_PROCID": "7"}, r"SLURM_PROCID must be an integer in \[0, 6\], got 7"),
        (STEP | {"SLURM_NODEID": "3"}, r"SLURM_NODEID must be an integer in \[0, 2\], got 3"),
        (STEP | {"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT must be an integer"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "got 4 processes of mpirun.*torchrun --nproc-per-node 4"),
        ({"MPI_LOCALNRANKS": "2", "PMI_RANK": "0"}, "got 2 processes of mpirun"),
    ],
)
def test_variables_that_make_no_sense_are_refused_in_one_line(environment, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        distributed.find_place(environment)
    assert "\n" not in str(error.value)


PLACE = "from ssl_xcit.runtime import distributed as d; import os; print(d.find_place(os.environ))"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("{python}", "an interactive shell in SLURM, whose 2 tasks need srun"),
        ("{python} & wait", "an interactive shell in SLURM, whose 2 tasks need srun"),
        ("env SLURM_TASK_PID=1 {python}", "an interactive shell in SLURM, whose 2 tasks need srun"),
        # an inner srun: its task is another process than the shell, which typed it
        ("sh -c 'SLURM_TASK_PID=$$ exec {python}'", "'SLURM', rank=0, world_size=2"),
        ("sh -c 'export SLURM_TASK_PID=$$; {python}; true'", "'SLURM', rank=0, world_size=2"),
    ],
)
def test_what_is_typed_into_a_shell_of_a_step_is_no_rank(tmp_path, command, expected):
    """A real shell on a terminal, which reads the command as if it was typed."""
    (tmp_path / "place.py").write_text(PLACE)
    python = f"{sys.executable} {tmp_path}/place.py"
    two = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    two |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_PTY_PORT": "35000"}
    parent, child = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile"],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={k: v for k, v in os.environ.items() if not names_a_launcher(k)} | STEP | two
        | {"PS1": "", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    os.close(child)
    text = f"export SLURM_TASK_PID=$$\n{command.format(python=python)} > {tmp_path}/out\nexit\n"
    if "&" in command:
        text = text.replace(f" > {tmp_path}/out", "").replace(" &", f" > {tmp_path}/out &")
    os.write(parent, text.encode())
    shell.wait(60)
    os.close(parent)
    assert expected in (tmp_path / "out").read_text()


def start_rank(rank, port, timeout_s, then="", **variables):
    """A process that joins as one of two ranks of a launcher that sets torchrun's variables."""
    program = "from ssl_xcit.runtime import distributed as d, errors\n"
    program += f"with errors.exit_on_user_error(): d.setup('cpu', {timeout_s})\n{then}"
    given = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | variables
    return forked.Popen(
        [sys.executable, "-c", program],
        env={k: v for k, v in os.environ.items() if not names_a_launcher(k)} | given,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ended(process, timeout_s=40):
    """(exit status, stdout, last line of stderr)"""
    output, errors = process.communicate(timeout=timeout_s)
    return process.returncode, output, errors.splitlines()[-1] if errors else ""


def test_a_taken_port_ends_every_rank_with_one_line():
    with socket.socket() as other:  # it listens, and says nothing
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ranks = [start_rank(rank, port, 1800) for rank in range(2)]
        found = [ended(process) for process in ranks]
    taken = f"error: port {port} of localhost is taken, by another job or program: choose another"
    assert found[0][0] == found[1][0] == 2
    assert found[0][2].startswith(taken)
    assert f"error: at localhost:{port} answers something else than rank 0" in found[1][2]


def test_a_second_job_on_the_port_of_a_first_does_not_join_it():
    port = free_port()
    hold = "import torch, time; print('met', flush=True); time.sleep(60)"
    first = [start_rank(rank, port, 60, hold) for rank in range(2)]
    try:
        while "met" not in first[0].stdout.readline():
            assert first[0].poll() is None
        found = [ended(start_rank(rank, port, 1800)) for rank in range(2)]
        assert [process.poll() for process in first] == [None, None]
    finally:
        for process in first:
            process.kill()
            process.communicate()
    assert [status for status, _, _ in found] == [2, 2]
    assert f"error: port {port} of localhost is taken" in found[0][2]
    assert f"error: 2 other ranks have met at localhost:{port}" in found[1][2]


def test_a_rank_that_waits_says_for_whom_and_how_not_to():
    port = free_port()
    status, output, error = ended(start_rank(0, port, 12))
    advice = "run one process with: env -u RANK -u WORLD_SIZE COMMAND"
    assert f"waiting for rank 1 of 2 at localhost:{port}; start all" in output
    assert f"{advice} (for 10 s)" in output
    assert status == 2
    assert error.startswith(f"error: waited 12 s in vain for rank 1 of 2 at localhost:{port}")
    assert error.endswith(advice)


def test_torchruns_store_may_be_there_long_before_rank_0_is():
    port = free_port()
    agent = torch.distributed.TCPStore("localhost", port, 2, True, wait_for_workers=False)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    early = start_rank(1, port, 60, "print('met')", **variables)
    with pytest.raises(subprocess.TimeoutExpired):
        early.wait(distributed.rendezvous.FOREIGN_S + 4)
    late = start_rank(0, port, 60, "print('met')", **variables)
    for process in (early, late):
        assert "met" in ended(process)[1]
    assert agent.num_keys() > 0


def test_a_name_without_an_address_is_refused_at_once():
    status, _, error = ended(start_rank(1, 29501, 1800, MASTER_ADDR="nowhere.invalid"))
    assert status == 2
    assert error.startswith("error: cannot resolve nowhere.invalid, where rank 0 is to be")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05]", "gpu03"),
        ("gpu[7,9-12],cpu1", "gpu7"),
        ("rack[2-3]node[08,11]-ib,login", "rack2node08-ib"),
        ("10.0.0.[17-18]", "10.0.0.17"),
    ],
)
def test_rank_0_is_on_the_first_node_of_slurms_list(nodes, first):
    place = distributed.find_place(STEP | {"SLURM_STEP_NODELIST": nodes})
    assert place.address == first


def test_every_rank_knows_the_port_and_another_attempt_or_step_has_another():
    def port(**changes):
        return distributed.find_place(STEP | changes).port

    attempts = [port(SLURM_RESTART_COUNT=str(count)) for count in range(1, 6)]
    others = [port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="13")]
    assert port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0") == port()
    assert len({port(), *attempts, *others}) == 8
    assert all(1024 < number < 32768 for number in (port(), *attempts, *others))


def test_a_stale_rank_of_an_earlier_attempt_cannot_join(alone):
    """The new rank 0 waits for its own rank 1 only, though the old one calls all the time."""
    ours = STEP | {
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    ours |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    stale = ours | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    program = "from ssl_xcit.runtime import distributed; distributed.setup('cpu', timeout_s=60)"
    process = forked.Popen(
        [sys.executable, "-c", program], env=os.environ | stale, stderr=subprocess.DEVNULL
    )
    try:
        for name, value in (ours | {"SLURM_RESTART_COUNT": "1"}).items():
            alone.setenv(name, value)
        with pytest.raises(UserError, match="waited 4 s in vain for rank 1 of 2"):
            distributed.setup("cpu", timeout_s=4.0)
        assert process.poll() is None  # it was there
    finally:
        process.kill()
        process.wait()


def test_setup_prints_its_decision_and_leaves_torchruns_variables(alone, capsys):
    alone.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    alone.setattr(distributed.rendezvous, "meet", lambda *_: None)
    for name, value in STEP.items():
        alone.setenv(name, value)
    distributed.setup("cpu")
    assert capsys.readouterr().out == ""  # rank 6 of a launcher that mixes all output
    alone.setenv("SUBMITIT_EXECUTOR", "slurm")
    distributed.setup("cpu")
    port = os.environ["MASTER_PORT"]
    assert capsys.readouterr().out == (
        f"rank 6 of 7 (submitit), local rank 1 of 2, on cpu; rank 0 is at gpu03:{port}\n"
    )
    assert (os.environ["MASTER_ADDR"], os.environ["LOCAL_WORLD_SIZE"]) == ("gpu03", "2")


def test_a_task_that_slurm_gives_its_own_gpus_takes_its_first(alone):
    alone.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    alone.setattr(distributed.rendezvous, "meet", lambda *_: None)
    alone.setattr(torch.cuda, "set_device", lambda device: None)
    with_gpus(alone, 2)
    for name, value in STEP.items():
        alone.setenv(name, value)
    assert distributed.setup("cuda").device == torch.device("cuda:1")  # sees all of the machine
    alone.setenv("SLURM_GPUS_PER_TASK", "2")
    assert distributed.setup("cuda").device == torch.device("cuda:0")


def with_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 3, "cpu"),
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 4, 0, "cuda:0"),
        ("cuda", 1, 3, "cuda:0"),  # each task sees one GPU, its own
        ("cpu", 4, 3, "cpu"),
    ],
)
def test_device_follows_the_request_and_what_the_process_sees(
    monkeypatch, device, gpus, local_rank, expected
):
    with_gpus(monkeypatch, gpus)
    assert distributed.choose_device(device, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "gpus", "local_rank", "complaint"),
    [
        ("cuda", 0, 0, "torch sees none: use device cpu"),
        ("cuda", 2, 2, r"at most 2 ranks.*got local rank 2"),
        ("gpu", 2, 0, "auto, cpu or cuda, got 'gpu'"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_in_one_line(
    monkeypatch, device, gpus, local_rank, complaint
):
    with_gpus(monkeypatch, gpus)
    with pytest.raises(UserError, match=complaint) as error:
        distributed.choose_device(device, local_rank)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    worker(sys.argv[1])
