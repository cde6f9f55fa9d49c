"""A real SLURM of several nodes on this machine, for the tests: Debian's own daemons, as root.

    with SlurmCluster(nodes=4) as cluster:
        cluster.run("sbatch", "--wrap", "hostname")

The nodes are `slurmd` processes; they lie about their cores, and the commands `cluster.environment`
reaches are sbatch, squeue, scontrol and so on. Everything lives in one temporary folder and listens
on the loopback interface. Whatever was started carries the folder's name in its environment, jobs
too, so that leaving finds and ends all of it; the daemons die with the process that started them.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path

PACKAGES = {  # a program of each Debian package that is needed
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
PLUGINS = "slurm-wlm-basic-plugins"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
WANTED = os.environ.get("SLURM_TESTS", "")
"""By default the tests run where there can be a SLURM (as root on Debian: it is installed) and are
skipped elsewhere. "required": they fail there. "no-install": apt-get is never called."""

CPUS = 8  # that each node pretends to have
REQUEUE_DELAY_S = 5  # the least that SLURM takes; by default a job waits for 120 s
NODE_TIMEOUT_S = 10  # of silence, then a node counts as down
GRACE_S = 60  # that a preempted job may run on
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
"""States of a job that will not run again."""

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
{listen}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
# It tells of every signal
SlurmctldDebug=verbose
SlurmdLogFile={folder}/%n/slurmd.log
# A container has no cgroups to track processes by
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# Clusters differ in these; the harder choice each
JobRequeue=0
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=86400
SlurmdTimeout={node_timeout}
ReturnToService=2
NodeName={names} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} \
RealMemory=1000000 State=UNKNOWN
PartitionName=main Nodes={names} Default=YES PriorityTier=5 PreemptMode=OFF MaxTime=7-0
PartitionName=low Nodes={names} PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=7-0
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=7-0
"""


class Unavailable(Exception):  # noqa: N818 - no error, a reason to skip
    """There can be no SLURM here; the message says why."""


def install() -> None:
    """Install Debian's packages where they are missing. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons want root")
    missing = [
        package for name, package in PACKAGES.items() if shutil.which(name, path=PATH) is None
    ]
    if not list(Path("/usr/lib").glob("*/slurm-wlm/select_cons_tres.so")):
        missing.append(PLUGINS)
    if not missing:
        return
    if WANTED == "no-install" or shutil.which("apt-get") is None:
        raise Unavailable(f"{', '.join(missing)} not installed, and apt-get not to be called")
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()  # it keeps the packages from starting daemons of their own
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "text": True}
        quiet |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "check": False}
        subprocess.run([*apt, "update"], **quiet)  # an old list may still do
        command = [*apt, "install", "-y", "--no-install-recommends", *missing]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, **quiet)
    finally:
        if ours:
            policy.unlink()
    if done.returncode:
        raise Unavailable(f"apt-get could not install {' '.join(missing)}: {done.stdout[-500:]}")


class SlurmCluster(AbstractContextManager):
    """A cluster of `nodes` nodes with the partitions main, and low, which high preempts.

    Jobs in `low` are told by SIGCONT and SIGTERM (that is SLURM's default) that they are preempted,
    and killed and queued again after `GRACE_S` seconds. Without `--requeue` a job is queued only
    once. Node names are loopback addresses, which resolve on every machine.

    Attributes:
        environment: for processes that shall see this cluster.
        names: of the nodes.
    """

    def __init__(self, nodes: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets: short paths
        self.names = [f"127.0.0.{10 + number}" for number in range(nodes)]
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": PATH,
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D")
            for name in self.names:
                self.start_node(name)
            self._wait_for_nodes(self.names)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        """End every process of the cluster and of its jobs, and remove its folder."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + 5
            while (running := self._processes()) and time.monotonic() < end:
                for pid in running:
                    _kill(pid, number)
                time.sleep(0.1)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # What a test does

    def run(self, *command: str, **options) -> str:
        """Run a command of SLURM's; its output. Raises CalledProcessError."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, **options
        )
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: {"JobState": "RUNNING", "Restarts": "0", ...}"""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL, ..."""
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 300) -> str:
        """Wait until the job is in one of `states` (by default: has ended); which."""
        wanted = states or ENDED
        end = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job_id} is {state} after {timeout_s:g} s, not {wanted}")
            time.sleep(0.2)
        return state

    def has_signalled(self, job_id: str, number: int) -> bool:
        """Whether SLURM has sent the job this signal, of its own accord or for somebody."""
        log = (self.folder / "log/slurmctld.log").read_text(errors="replace")
        return f"job_signal: {number:d} of running JobId={job_id} successful" in log

    def tasks(self, job_id: str) -> list[int]:
        """Process ids of a job's running tasks."""
        return self._processes(f"SLURM_JOB_ID={job_id}", "SLURM_STEP_ID=")

    def kill_node(self, name: str) -> None:
        """The node loses its power: its daemon and all processes of its jobs end without a word."""
        daemon = self._daemons.pop(name)
        for number in (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL):  # nobody reports a death
            there = self._processes(f"SLURMD_NODENAME={name}", folder=self.folder / name)
            for pid in {daemon.pid, *there}:
                _kill(pid, number)
        daemon.wait()

    def start_node(self, name: str) -> None:
        """Start the node's daemon, for the first time or after `kill_node`."""
        folder = self.folder / name  # where its slurmstepds run, too
        (folder / "spool").mkdir(parents=True, exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name, folder=folder)

    # How it works

    def _configure(self) -> None:
        for name in ("state", "log", "munge"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)  # munged insists
        (self.folder / "munge").chmod(0o700)
        host, count = socket.gethostname().partition(".")[0], len(self.names)
        ports = _free_ports(1 + count)
        # The daemons bind what the machine's own name resolves to; where that is not 127.0.0.1, as
        # with Debian's 127.0.1.1, tasks would call back in vain, so there they bind all addresses.
        try:
            loopback = socket.gethostbyname(host) == "127.0.0.1"
        except OSError:
            loopback = False
        listen = "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if loopback else ""
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=host,
                ports=ports,
                node_ports=f"[{ports[1]}-{ports[-1]}]",
                names=f"127.0.0.[10-{9 + count}]",
                cpus=CPUS,
                listen=listen,
                requeue_delay=REQUEUE_DELAY_S,
                node_timeout=NODE_TIMEOUT_S,
                grace=GRACE_S,
            )
        )

    def _start_munge(self) -> None:
        key, socket_path = self.folder / "munge/key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._start(
            "munge", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={socket_path}", f"--pid-file={self.folder}/munge/pid",
            f"--log-file={self.folder}/munge/log", f"--seed-file={self.folder}/munge/seed",
        )  # fmt: skip
        end = time.monotonic() + 10
        while not socket_path.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"munged did not start: {self._log('munge')}")
            time.sleep(0.02)

    def _start(self, label: str, program: str, *arguments: str, folder: Path | None = None) -> None:
        """A daemon in the foreground, that dies with us."""
        with open(self.folder / "log" / f"{label}.out", "w") as output:
            self._daemons[label] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", program, *arguments],
                env=self.environment,
                cwd=folder or self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest
            )

    def _wait_for_nodes(self, names: list[str]) -> None:
        end = time.monotonic() + 60
        while True:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"],
                env=self.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            idle = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")]
            if set(names) <= set(idle):
                return
            for label, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{label} ended: {self._log(label)}")
            if time.monotonic() > end:
                logs = "\n".join(self._log(label) for label in self._daemons)
                raise TimeoutError(f"nodes not idle after 60 s: {done.stdout}\n{logs}")
            time.sleep(0.1)

    def _log(self, label: str) -> str:
        """The end of what a daemon wrote."""
        paths = [
            self.folder / "log" / f"{label}.out",
            self.folder / "log" / f"{label}.log",
            self.folder / label / "slurmd.log",
        ]
        texts = [path.read_text(errors="replace")[-2000:] for path in paths if path.exists()]
        return "\n".join([f"--- {label}", *texts])

    def _processes(self, *variables: str, folder: Path | None = None) -> list[int]:
        """Ids of the cluster's living processes, of the daemons and of all jobs.

        They carry the cluster's folder in their environment. Only those that have variables that
        begin like these, too; or, as the slurmstepds of a node, are in the working directory
        `folder`.
        """
        mark = f"SLURM_CONF={self.folder}/"
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                theirs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                cwd = os.readlink(entry / "cwd")
            except OSError:
                continue  # it has ended
            has = [any(text.startswith(name) for text in theirs) for name in (mark, *variables)]
            if has[0] and (all(has) or cwd == str(folder)) and state != "Z":
                found.append(int(entry.name))
        return found


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_ports(count: int) -> list[int]:
    """Consecutive free ports, below those that the system hands out by itself."""
    for first in range(16_800, 32_000, 50):
        sockets = []
        try:
            for port in range(first, first + count):
                probe = socket.socket()
                sockets.append(probe)
                probe.bind(("127.0.0.1", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise RuntimeError("no free ports")
