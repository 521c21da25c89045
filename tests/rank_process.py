"""The inside of one test rank: form the group, run the function, report, leave cleanly.

The forkserver preloads this module, so everything imported here is already warm in every rank. Importing it must
only import: no tensor operation, no question to CUDA, no thread (``test_distributed.py`` asserts it), because a
process that has done any of these cannot be forked safely.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import tempfile
import traceback
import types
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent

# torch imports these when they are first used; together they take longer than forming a group.
WARM_MODULES = (
    "numpy",
    "pytest",
    "hypothesis",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention",
    "torch.testing",
    "torch.utils.checkpoint",
)


@dataclass(frozen=True)
class RankJob:
    """What one rank has to run. ``payload`` is the pickled (args, kwargs): plain pickle copies tensors, while
    multiprocessing's own pickler would move them to shared memory."""

    rank: int
    world_size: int
    backend: str
    timeout_s: float
    scratch: str
    module_name: str
    module_file: str
    function: str
    payload: bytes


def run_rank(job: RankJob, report: Connection) -> None:
    """Sends ("result", pickled value) once the function returned, ("error", traceback) when anything raised."""
    stacks = open(stack_file(job.scratch, job.rank), "w")  # noqa: SIM115 - has to stay open for the signal handler
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    tempfile.tempdir = job.scratch  # so that nothing is left when a rank ends without cleaning up
    status = 0
    try:
        _form_group(job)
        function = getattr(_load_module(job.module_name, job.module_file), job.function)
        args, kwargs = pickle.loads(job.payload)
        report.send(("result", pickle.dumps(function(*args, **kwargs))))
        _leave_group()
    except BaseException:  # SystemExit and pytest.fail are failures of the rank as well
        report.send(("error", traceback.format_exc()))
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads can abort the process while the interpreter is torn down


def stack_file(scratch: str, rank: int) -> Path:
    """Where a rank writes the stacks of its threads when it receives SIGUSR1."""
    return Path(scratch) / f"stacks-{rank}.txt"


def _form_group(job: RankJob) -> None:
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
    )
    torch.set_num_threads(1)
    if job.backend == "nccl":
        torch.cuda.set_device(job.rank)
    dist.init_process_group(
        job.backend,
        store=dist.FileStore(str(Path(job.scratch) / "store"), job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        timeout=datetime.timedelta(seconds=job.timeout_s),
    )


def _leave_group() -> None:
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still reads from them
        dist.destroy_process_group()


def _load_module(name: str, file: str) -> types.ModuleType:
    """The module the parent process knows as ``name``, loaded from its file as pytest's importlib mode does.

    It is registered under the same name, so that pickles which refer to its classes resolve in both directions.
    """
    if name in sys.modules:
        return sys.modules[name]
    for end in (i for i, character in enumerate(name) if character == "."):
        sys.modules.setdefault(name[:end], types.ModuleType(name[:end]))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def import_warm_modules() -> None:
    """Imports what tests use: the slow corners of torch, and all of megatron."""
    package = REPOSITORY / "megatron"
    files = sorted(package.rglob("*.py"))
    own = (".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files)
    for name in (*WARM_MODULES, *(name.removesuffix(".__init__") for name in own)):
        # A module that cannot be imported fails in the test that needs it, with its traceback, not here.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
