"""A cluster of one node each: Slurm's daemons, and Ray's, for as long as a check takes. Only what was started here is
ended again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PATIENCE = 120.0  # seconds until a daemon answers


@contextmanager
def daemon(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the foreground of a session of its own, ended with all that it started."""
    with log.open("ab") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, env=dict(environment), start_new_session=True)
    try:
        yield process
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


@contextmanager
def slurm(folder: Path, processors: int) -> Iterator[dict[str, str]]:
    """munged, slurmctld and slurmd, as root; what a command's environment must say to reach them."""
    folder.mkdir()
    name = socket.gethostname().split(".")[0]
    munge = folder / "munge.socket"
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 512
    conf = folder / "slurm.conf"
    conf.write_text("\n".join([
        "ClusterName=qtool", f"SlurmctldHost={name}(127.0.0.1)", "SlurmctldPort=26817", "SlurmdPort=26818",
        "AuthType=auth/munge", f"AuthInfo=socket={munge}", "CredType=cred/munge", "SlurmUser=root", "SlurmdUser=root",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool", f"SlurmctldPidFile={folder}/ctld.pid",
        f"SlurmdPidFile={folder}/slurmd.pid", "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_CPU_Memory", "MpiDefault=none", "ReturnToService=2",
        "AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none",
        "SchedulerParameters=sched_interval=1",
        f"NodeName={name} NodeAddr=127.0.0.1 CPUs={processors} RealMemory={memory} State=UNKNOWN",
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", "",
    ]))  # fmt: skip
    for made in ("state", "spool"):
        (folder / made).mkdir()
    environment = os.environ | {"SLURM_CONF": str(conf)}
    key, socket_of = f"--key-file={folder}/munge.key", f"--socket={munge}"
    beside = [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
    with ExitStack() as held:
        for words in (
            ["munged", "--foreground", "--force", key, socket_of, *beside],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf), "-N", name],
        ):
            held.enter_context(
                daemon([str(shutil.which(words[0])), *words[1:]], folder / f"{words[0]}.txt", environment)
            )
        _until(["sinfo", "--noheader", "--format=%T"], "idle", environment)
        yield {"SLURM_CONF": str(conf)}


@contextmanager
def ray(folder: Path, processors: int, program: str, port: int) -> Iterator[dict[str, str]]:
    """A head node; what a command's environment must say to find its program."""
    folder.mkdir()
    beside = str(Path(program).parent)
    environment = os.environ | {"PATH": f"{beside}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [program, "start", "--head", "--block", f"--port={port}", f"--num-cpus={processors}", "--num-gpus=0",
             "--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]  # fmt: skip
    with daemon(words, folder.with_name("ray.txt"), environment):
        _until([program, "health-check", "--address", f"127.0.0.1:{port}"], "", environment)
        yield {"PATH": environment["PATH"], "RAY_USAGE_STATS_ENABLED": "0"}


def _until(words: Sequence[str], answer: str, environment: Mapping[str, str]) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=dict(environment))
        if done.returncode == 0 and answer in done.stdout:
            return
        if time.monotonic() > end:
            raise SystemExit(f"{words[0]} does not answer: {done.stdout}{done.stderr}")
        time.sleep(0.5)
