"""A small kind of job: it writes the text of a file in upper case, and counts its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ryzen_compile.jobs.job import Job, JobKey, JobOutput, runs
from ryzen_compile.progress import Progress
from ryzen_compile.utils.files import hash_file
from ryzen_compile.utils.record import Record


class UpperCaseKey(JobKey, frozen=True):
    """The key: the sha256 of the text."""

    kind: ClassVar[str] = "upper-case"

    text: str


class TextLength(Record, frozen=True):
    """The result."""

    characters: int


class UpperCaseJob(Job[TextLength], frozen=True, kw_only=True):
    """Write the text of `source` in upper case to `output`, and its first character to a file that is named by its digest."""

    result_type: ClassVar[Any] = TextLength

    key: UpperCaseKey
    source: str
    output: str

    def path_of(self, name: str) -> str:
        return self.output if name == "text" else f"shared/{name}"


@runs(UpperCaseJob)
def run_upper_case_job(job: UpperCaseJob, folder: Path, progress: Progress) -> JobOutput[TextLength]:
    text = (folder / job.source).read_text()
    output, first = folder / job.output, folder / "shared" / "first"
    output.write_text(text.upper())
    first.parent.mkdir(exist_ok=True)
    first.write_text(text[:1])
    digest = hash_file(first, "sha256")
    first.rename(first.with_name(digest))
    return JobOutput(result=TextLength(characters=len(text)), files={"text": hash_file(output, "sha256"), digest: digest})


def upper_case_job(folder: Path, text: str, output: str = "out.txt") -> UpperCaseJob:
    """Return a job for `text`, which is written to a file in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "in.txt").write_text(text)
    digest = hash_file(folder / "in.txt", "sha256")
    return UpperCaseJob(key=UpperCaseKey(text=digest), inputs={"in.txt": digest}, source="in.txt", output=output)
