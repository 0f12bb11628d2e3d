"""Tests of the text of running stages: counts, elapsed and expected time, and the pace of lines."""

from __future__ import annotations

import pytest

from ryzen_compile.cli.stage_text import LINE_SECONDS, RunningStage, StageList, format_elapsed, format_estimate
from ryzen_compile.progress import StageItems


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_stage_with_a_total_shows_the_expected_time_after_its_first_item(clock: FakeClock) -> None:
    stage = RunningStage("compare", StageItems("cases", 40), clock)
    texts = [stage.text()]
    for seconds, count in ((8, 0), (0, 12), (4, 0), (60, 0), (0, 27), (6, 1), (2, 0)):
        clock.now += seconds
        stage.advance(count) if count else None
        texts.append(stage.text())
    assert texts == [
        "compare: 0 of 40 cases, 0 s",
        "compare: 0 of 40 cases, 8 s",
        "compare: 12 of 40 cases, 8 s, about 19 s left",
        "compare: 12 of 40 cases, 12 s, about 15 s left",
        "compare: 12 of 40 cases, 72 s",
        "compare: 39 of 40 cases, 72 s, about 2 s left",
        "compare: 40 of 40 cases, 78 s",
        "compare: 40 of 40 cases, 80 s",
    ]
    assert stage.summary() == "compare: 40 cases, 80.0 s"


def test_the_expected_time_follows_the_sizes_of_the_items(clock: FakeClock) -> None:
    stage = RunningStage("compare", StageItems("cases", 5, (1, 64, 64, 6000, 6000)), clock)
    texts = []
    for seconds in (2, 1, 1, 36):  # loading the model takes most of the first case
        clock.now += seconds
        stage.advance()
        texts.append(stage.text())
    clock.now += 38
    assert [*texts, stage.text()] == [
        "compare: 1 of 5 cases, 2 s",
        "compare: 2 of 5 cases, 3 s",
        "compare: 3 of 5 cases, 4 s",
        "compare: 4 of 5 cases, 40 s, about 39 s left",
        "compare: 4 of 5 cases, 78 s, about 1 s left",
    ]


def test_long_stages_are_given_in_minutes_and_hours(clock: FakeClock) -> None:
    stage = RunningStage("evaluate", StageItems("steps", 49_152), clock)
    clock.now += 125
    stage.advance(10_240)
    assert stage.text() == "evaluate: 10,240 of 49,152 steps, 2 min 5 s, about 8 min left"
    assert [format_elapsed(seconds) for seconds in (0.4, 119.4, 120, 725, 7199, 7500)] == [
        "0 s",
        "119 s",
        "2 min 0 s",
        "12 min 5 s",
        "119 min 59 s",
        "2 h 5 min",
    ]
    assert [format_estimate(seconds) for seconds in (19.4, 89, 119, 660, 7500)] == [
        "19 s",
        "89 s",
        "2 min",
        "11 min",
        "2 h 5 min",
    ]


def test_stages_without_a_total_or_counts_show_what_is_known(clock: FakeClock) -> None:
    trial, load = (
        RunningStage("try shapes", StageItems("runs"), clock),
        RunningStage("load the baseline", None, clock),
    )
    assert (trial.text(), load.text()) == ("try shapes", "load the baseline")
    clock.now += 3
    assert (trial.text(), load.text()) == ("try shapes: 3 s", "load the baseline: 3 s")
    trial.advance(5)
    assert trial.text() == "try shapes: 5 runs, 3 s"
    assert (trial.summary(), load.summary()) == ("try shapes: 5 runs, 3.0 s", "load the baseline: 3.0 s")


def test_the_newest_stage_with_counts_is_shown_otherwise_the_newest(clock: FakeClock) -> None:
    stages = StageList(clock)
    build, load, run = (RunningStage(title, None, clock) for title in ("build", "load", "run"))
    compare = RunningStage("compare", StageItems("cases"), clock)
    assert stages.text() is None
    stages.begin(build)
    stages.begin(load)
    assert stages.text() == "load"
    stages.begin(compare)
    stages.begin(run)
    assert stages.text() == "compare"
    assert [stages.end(stage) for stage in (compare, run, load)] == [False, False, False]
    assert stages.text() == "build"
    assert stages.end(build)
    assert stages.text() is None


def test_lines_keep_their_pace_across_short_stages(clock: FakeClock) -> None:
    stages = StageList(clock)
    lines: list[tuple[float, str | None]] = []
    for number in range(120):  # each stage is shorter than the time between lines
        stage = RunningStage(f"pass {number}", None, clock)
        stages.begin(stage)
        for _ in range(4):
            clock.now += 0.75
            if not stages.seconds_to_line():
                lines.append((clock.now, stages.next_line()))
        stages.end(stage)
    times = [time for time, _ in lines]
    assert times[0] == 100 + 10.5
    assert all(LINE_SECONDS <= after - before <= LINE_SECONDS + 0.75 for before, after in zip(times, times[1:], strict=False))
    assert lines[1] == (121.0, "pass 6: 3 s")
