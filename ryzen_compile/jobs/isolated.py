"""Jobs in child processes: a job that runs a user's model cannot crash, block or exhaust the process that asks for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ryzen_compile.jobs.job import Job, JobOutput, decode_job, encode_job, run_function
from ryzen_compile.processes.child_call import call_in_child
from ryzen_compile.progress import Progress
from ryzen_compile.utils.record import Record

ResultT = TypeVar("ResultT")


class _JobCall(Record, frozen=True):
    """A job that a child process is to run."""

    job: msgspec.Raw
    module: str
    """The module that defines the type of the job."""
    folder: str


class _JobReply(Record, frozen=True):
    """The output of a job."""

    result: msgspec.Raw
    files: dict[str, str]
    complete: bool


def run_isolated(job: Job[ResultT], folder: Path, progress: Progress) -> JobOutput[ResultT]:
    """Run the registered function of `job` in a child process within the limits of its resources.

    Raises the error of the function, and BackendError if the child process crashed or exceeded a limit.
    """
    call = _JobCall(job=msgspec.Raw(encode_job(job)), module=type(job).__module__, folder=str(folder))
    function = f"{__name__}:{_run_encoded.__name__}"
    encoded = call_in_child(
        function,
        msgspec.json.encode(call),
        label=job.label,
        preload=(type(job).__module__, *job.preload),
        limits=job.resources.limits,
        progress=progress,
    )
    reply = msgspec.json.decode(encoded, type=_JobReply)
    result: ResultT = msgspec.json.decode(reply.result, type=job.result_type)
    return JobOutput(result=result, files=reply.files, complete=reply.complete)


def _run_encoded(argument: bytes, progress: Progress) -> bytes:
    """Run an encoded `_JobCall` and return an encoded `_JobReply`; the function that the child process calls."""
    call = msgspec.json.decode(argument, type=_JobCall)
    importlib.import_module(call.module)
    job = decode_job(bytes(call.job))
    output: JobOutput[Any] = run_function(type(job))(job, Path(call.folder), progress)
    reply = _JobReply(
        result=msgspec.Raw(msgspec.json.encode(output.result)), files=dict(output.files), complete=output.complete
    )
    return msgspec.json.encode(reply)
