"""Start-up time of the command line program, relative to that of the Python interpreter.

    python benchmarks/start_up.py [--rounds 15] [--save FILE]

Bound: `ryzen-compile --help` takes at most 6 times as long as `python -c pass`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from process import argument_parser, median, run_interleaved, save

MAX_RATIO = 6.0


def main() -> int:
    args = argument_parser(__doc__, rounds=15).parse_args()
    program = str(Path(sys.executable).with_name("ryzen-compile"))
    commands = {
        "pass": [sys.executable, "-c", "pass"],
        "help": [program, "--help"],
        "import": [sys.executable, "-c", "import ryzen_compile"],
    }
    runs = run_interleaved(commands, rounds=args.rounds)
    seconds = {name: median([run.seconds for run in command_runs]) for name, command_runs in runs.items()}
    ratio = median([help_run.seconds / pass_run.seconds for help_run, pass_run in zip(runs["help"], runs["pass"], strict=True)])
    for name, value in seconds.items():
        print(f"{' '.join(commands[name][-2:]):40} {value * 1000:7.1f} ms")
    print(f"help / pass: {ratio:.2f} (at most {MAX_RATIO:g})")
    save(args.save, {"seconds": seconds, "help_over_pass": ratio, "bound": MAX_RATIO})
    return 0 if ratio <= MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
