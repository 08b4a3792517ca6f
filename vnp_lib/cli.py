"""The `vnp` command: looks into run directories. `python flows/embed.py` is what makes them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vnp_lib.failures import ExitCode, InputError
from vnp_lib.verify import verify_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what cannot be used is said in one sentence, with exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except InputError as error:
        print(error, file=sys.stderr)
        return ExitCode.UNUSABLE_INPUT


def verify(options: argparse.Namespace) -> ExitCode:
    report = verify_run(options.run_dir)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print(*report.lines(), sep="\n")
    return ExitCode.DONE if report.is_well else ExitCode.FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vnp", description="Look into run directories.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    on_a_run = argparse.ArgumentParser(add_help=False)
    on_a_run.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what --output-dir was")
    on_a_run.add_argument("--json", action="store_true", help="print JSON")
    verifying = commands.add_parser(
        "verify",
        parents=[on_a_run],
        help="read everything again, and say what is damaged and what the next run computes",
        description="Read every byte of a run: plan, checkpoints, manifest, dataset. Say what is damaged and what the next run "
        "computes. Nothing is changed; a run may be going on. Exit code 0: nothing is damaged, 1: something is, 2: RUN_DIR "
        "is not a run directory.",
    )
    verifying.set_defaults(command=verify)
    return parser
