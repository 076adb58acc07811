"""The door to a run's tools: `python -m run doctor`, `python -m run report RUN_FOLDER`."""

import argparse
import sys
from collections.abc import Sequence

from run.start import refusing


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for what the person at the keyboard can mend."""
    parser = argparse.ArgumentParser(prog="python -m run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, and for each backend that is off, why")
    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("run_folder", help="for example runs/quickstart")
    arguments = parser.parse_args(words)

    def enter() -> None:
        if arguments.command == "doctor":
            from run.doctor import doctor, show

            show(doctor())
        else:
            from run.report import write_report

            print(write_report(arguments.run_folder))

    return refusing(enter)


if __name__ == "__main__":
    sys.exit(main())
