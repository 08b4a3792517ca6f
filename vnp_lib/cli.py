"""The `vnp` command, which inspects runs and the model; `python flows/embed.py` starts runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from vnp_lib.config import DType, EmbedConfig, ModelName, weights_path
from vnp_lib.dataset import FORMATS, RAGGED_FORMATS, export_dataset
from vnp_lib.errors import ConfigError, ExitCode, InputError, StorageError, VnpError
from vnp_lib.options import parse_estimate_command_line
from vnp_lib.plan import RunPaths, StoreDtype
from vnp_lib.report import (
    RunEstimate,
    RunStatus,
    estimate_run,
    load_plan_of,
    open_status,
    render_estimate,
    render_status,
    verify_run,
    watch,
    write_report,
)
from vnp_lib.streams import output_error, standard_streams
from vnp_lib.terminal import console
from vnp_lib.user_paths import PathUse, user_path

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vnp_lib.report import ModelReport

    _Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for unusable input, with a message of one line.

    A reader of standard output that exits early (`| head`) is no error; a full disk there is one.
    """
    with standard_streams():
        parser = _parser()
        try:
            options, others = parser.parse_known_args(arguments)
            options.others = others
            if others and options.command is not plan:
                parser.error(f"unrecognized arguments: {' '.join(others)}")
            if "run_dir" in options and not options.run_dir.is_dir():
                fault = "it is a file" if options.run_dir.exists() else "there is no such directory"
                raise ConfigError(f"{options.run_dir} is not a run directory: {fault}")
            code = int(options.command(options))
        except InputError as unusable:
            print(unusable, file=sys.stderr)
            code = ExitCode.UNUSABLE_INPUT
        if error := output_error():
            print(
                f"standard output cannot be written: {getattr(error, 'strerror', None) or error}",
                file=sys.stderr,
            )
            return code or ExitCode.FAILED
        return code


def verify(options: argparse.Namespace) -> ExitCode:
    report = verify_run(options.run_dir)
    if options.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print(*report.lines(), sep="\n")
    return ExitCode.DONE if report.is_well else ExitCode.FAILED


def _show(
    found: RunStatus | RunEstimate | ModelReport,
    render: Callable[[Any], RenderableType],
    *,
    as_json: bool,
) -> None:
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        console().print(render(found))


def status(options: argparse.Namespace) -> ExitCode:
    if options.watch is not None and options.json:
        raise ConfigError(
            "--watch draws on a terminal and --json prints for programs: use one of them"
        )
    read = open_status(options.run_dir)
    if options.watch is not None:
        with suppress(KeyboardInterrupt):
            watch(read, interval_s=options.watch, console=console())
    else:
        _show(read(), render_status, as_json=options.json)
    return ExitCode.DONE


def plan(options: argparse.Namespace) -> ExitCode:
    estimate = estimate_run(parse_estimate_command_line(options.others))
    _show(estimate, render_estimate, as_json=options.json)
    return ExitCode.DONE if estimate.can_begin else ExitCode.FAILED


def export(options: argparse.Namespace) -> ExitCode:
    try:
        done = export_dataset(
            options.run_dir,
            options.to,
            column=options.column,
            output=options.output,
            dtype=options.store_dtype,
            replace=options.force,
            allow_partial=options.allow_partial,
        )
    except StorageError as error:
        print(error, file=sys.stderr)
        return ExitCode.FAILED
    print(*done.lines(), sep="\n")
    return ExitCode.DONE


def report(options: argparse.Namespace) -> ExitCode:
    try:
        print(write_report(load_plan_of(options.run_dir), RunPaths(options.run_dir)))
    except StorageError as error:
        raise ConfigError(str(error)) from None
    return ExitCode.DONE


def verify_model(options: argparse.Namespace) -> ExitCode:
    # It imports torch, which takes seconds.
    from vnp_lib.report import compare_with_fair_esm, render_model_report

    report = compare_with_fair_esm(
        options.model, options.weights, dtype=options.dtype, device=options.device
    )
    _show(report, render_model_report, as_json=options.json)
    return ExitCode.DONE if report.is_close else ExitCode.FAILED


def esm_extract(options: argparse.Namespace) -> ExitCode:
    # It imports torch, which takes seconds.
    from vnp_lib.esm_extract import ExtractSettings, extract

    arguments = vars(options) | {
        "include": frozenset(options.include),
        "repr_layers": tuple(options.repr_layers),
    }
    del arguments["command"], arguments["others"]
    settings = ExtractSettings(**arguments)
    try:
        num_files = extract(settings)
    except InputError:
        raise
    except (VnpError, OSError) as error:
        print(error, file=sys.stderr)
        return ExitCode.FAILED
    except KeyboardInterrupt:
        print(f"interrupted; the files in {settings.output_dir} are intact", file=sys.stderr)
        return ExitCode.INTERRUPTED
    print(f"{num_files:,} files are in {settings.output_dir}")
    return ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vnp", description="Inspect run directories, estimate runs, and verify the model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    on_a_run = argparse.ArgumentParser(add_help=False)
    on_a_run.add_argument(
        "run_dir",
        type=lambda text: user_path(text, PathUse.RUN),
        metavar="RUN_DIR",
        help="the --output-dir of a run",
    )

    command = commands.add_parser(
        "status",
        parents=[on_a_run, as_json],
        help="show the progress of each shard and the time left",
        description="Show the progress of each shard, the last failure and the time left, from the "
        "records of the run: quickly, without a server, also during a run. Exit code 0, or 2: "
        "RUN_DIR is not a run directory.",
    )
    command.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=5.0,
        metavar="SECONDS",
        help="redraw every SECONDS (5 by default) until Ctrl-C",
    )
    command.set_defaults(command=status)

    # Its other options are those of a run; they are read and explained in vnp_lib.options.
    command = commands.add_parser(
        "plan",
        parents=[as_json],
        add_help=False,
        allow_abbrev=False,
        help="dry run: check the input and disk space, estimate the run time",
    )
    command.set_defaults(command=plan)

    _add_export(commands, on_a_run)

    command = commands.add_parser(
        "report",
        parents=[on_a_run],
        help="write report.html: speed, attempts, failures and quarantine on one page",
        description="Write RUN_DIR/report.html and print its path: attempts over time, speed, "
        "sequence lengths, batches, checkpoints, failures and quarantine, on one page that needs "
        "no network. Exit code 0, or 2: RUN_DIR is not a run directory, or cannot be written.",
    )
    command.set_defaults(command=report)

    _add_esm_extract(commands)

    command = commands.add_parser(
        "verify",
        parents=[on_a_run, as_json],
        help="read everything again, report damage and what the next run computes",
        description="Read every byte of a run: plan, checkpoints, manifest, dataset. Report damage "
        "and what the next run computes. Nothing is changed, also during a run. Exit code 0: no "
        "damage, 1: damage, 2: RUN_DIR is not a run directory.",
    )
    command.set_defaults(command=verify)

    _add_verify_model(commands, as_json)
    return parser


def _add_export(commands: _Commands, on_a_run: argparse.ArgumentParser) -> None:
    formats = "\n".join(f"  {name:<13} {chosen.about}" for name, chosen in FORMATS.items())
    parser = commands.add_parser(
        "export",
        parents=[on_a_run],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="write the dataset in a format that other tools read",
        description="Write the dataset in a format that other tools read, and print how to read\n"
        "it. The export is complete or absent, even if the process is killed; the dataset is not\n"
        "changed. Exit code 0, 1: the disk or the dataset failed, 2: an argument cannot be used.",
        epilog=f"formats:\n{formats}\n\nfor columns with values for each residue (per_tok, "
        f"contacts, logits): {', '.join(RAGGED_FORMATS)}",
    )
    parser.add_argument(
        "--to", required=True, choices=FORMATS, metavar="FORMAT", help="one of the formats below"
    )
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the column of the dataset to export, such as mean_33 or per_tok_33; by default the "
        "only one of vectors, and all for esm-extract",
    )
    parser.add_argument(
        "--output",
        type=_output,
        metavar="PATH",
        help="the file or directory to write; by default in RUN_DIR/exports",
    )
    parser.add_argument(
        "--store-dtype",
        type=StoreDtype,
        choices=tuple(StoreDtype),
        default=StoreDtype.FLOAT32,
        metavar="DTYPE",
        help="float32, or float16: half the size, rounded to 11 significant bits; a value above "
        "65,504 is an error",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="export a dataset from which sequences are missing",
    )
    parser.set_defaults(command=export)


def _add_esm_extract(commands: _Commands) -> None:
    parser = commands.add_parser(
        "esm-extract",
        help="replace fair-esm's esm-extract: the same arguments and files",
        description="Write OUTPUT_DIR/LABEL.pt for each sequence, like fair-esm's esm-extract with "
        "the same arguments, but faster. LABEL is the complete header line. Values are those of "
        "float32. Existing files of these names are replaced. Exit code 0, 1: not enough memory or "
        "disk space, 2: an argument, the input or a label cannot be used.",
    )
    parser.add_argument(
        "model_location", help="path of the model's weights, as in --weights of a run, or its name"
    )
    parser.add_argument("fasta_file", type=user_path, help="FASTA file, also compressed; or a pipe")
    parser.add_argument("output_dir", type=_output, help="directory for the files")
    parser.add_argument(
        "--toks_per_batch",
        type=int,
        default=4096,
        metavar="N",
        help="tokens per forward pass (4096)",
    )
    parser.add_argument(
        "--repr_layers",
        type=int,
        nargs="+",
        default=[-1],
        metavar="N",
        help="layers, from 0 (the embedding) to the number of layers, or negative from the end; "
        "-1, the last, by default",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        required=True,
        choices=["mean", "per_tok", "bos", "contacts"],
        help="outputs per sequence",
    )
    parser.add_argument(
        "--truncation_seq_length",
        type=int,
        default=1022,
        metavar="N",
        help="residues after which a sequence is cut (1022)",
    )
    parser.add_argument(
        "--nogpu", action="store_true", help="use the CPU even if a GPU is available"
    )
    parser.set_defaults(command=esm_extract)


def _add_verify_model(commands: _Commands, as_json: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "verify-model",
        parents=[as_json],
        help="compare the model with fair-esm's on this machine, layer by layer",
        description="Embed a few proteins with fair-esm, in float32 on the CPU, and with this "
        "package, from the same weights. Report the differences layer by layer, and whether the "
        "weights are the official ones. Host memory: 4 bytes per parameter, 12 GB for 3B. Exit "
        "code 0: close enough, 1: not, 2: a setting or the weights cannot be used.",
    )
    default = {name: field.default for name, field in EmbedConfig.model_fields.items()}
    parser.add_argument(
        "--model",
        choices=get_args(ModelName),
        default=default["model"],
        help="%(default)s by default",
    )
    parser.add_argument(
        "--weights",
        type=weights_path,
        default=default["weights"],
        metavar="TEXT",
        help="as for a run: 'auto', 'random', or a path",
    )
    parser.add_argument(
        "--dtype", choices=get_args(DType), default=default["dtype"], help="as for a run"
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="TEXT",
        help="'auto' (the first GPU, or the CPU without one), 'cpu', or the number of a GPU",
    )
    parser.set_defaults(command=verify_model)


def _output(text: str) -> Path:
    return user_path(text, PathUse.OUTPUT)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 86400 seconds")
    return seconds
