"""Bad days, measured: kills, full disks, two writers, bad input, hostile folders, signals, old dependencies; one command, a table each.

    python benchmarks/reliability.py --kills 50 --json benchmarks/results/reliability.json

Two tables are of kills (kills.py). At a random moment of the undisturbed run's duration, or before one of its file operations, a
command gets SIGKILL; then the same command runs to its end, and every file of its folder is compared with the undisturbed run's, byte by
byte. Every reader looks at the folder as it lies before each file operation.

The other tables are the tests of tests/test_bad_days_*.py and of some slow tests beside them, with the line that each of them ended in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills import OF_NEITHER, ROOT, kill_table, operation_line, operation_table

TABLES = {
    "disk": "tests/test_bad_days_disk.py",
    "concurrency": "tests/test_bad_days_lock.py",
    "bad input": "tests/test_bad_days_input.py",
    "cache": "tests/test_bad_days_cache.py",
    "hostile folders": "tests/test_bad_days_hostile.py",
    "hostile files": "tests/test_hostile_files.py",
    "hostile texts": "tests/test_terminal.py",
    "signals": "tests/test_bad_days_signals.py",
    "fuzz": "tests/test_fuzz_folders.py",
    "floors": "tests/scripts/test_lowest.py",
}


def test_table(path: str, work: Path) -> list[dict[str, Any]]:
    """The tests of one file: name, outcome and the line that was told."""
    report = work / f"{Path(path).stem}.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"--junitxml={report}", path],
        cwd=ROOT,
        check=False,
    )
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        lines = [each.get("value", "") for each in case.iter("property") if each.get("name") == "line"]
        rows.append({"case": case.get("name"), "outcome": bad[0] if bad else "passed", "line": " ".join(lines)[:2000]})
    return rows


def summary(result: dict[str, Any]) -> list[str]:
    """What is printed and quoted: a line for each row."""
    lines = [
        "kills: command, undisturbed seconds, kills, caught running, left a half-written file, resumes with other bytes"
    ]
    for row in result.get("kills", []):
        kills = row["kills"]
        killed, half, other = (sum(1 for each in kills if each[name]) for name in ("killed", "half_written", "differ"))
        lines.append(f"  {row['command']}: {row['seconds']} s, {len(kills)}, {killed}, {half}, {other}")
    lines += ["file operations:", *map(operation_line, result.get("operations", []))]
    for table in TABLES:
        rows = result.get(table, [])
        passed, skipped = (sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "skipped"))
        lines.append(f"{table}: {len(rows)} cases, {passed} as expected, {skipped} skipped")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write them; 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="where the tables go")
    parser.add_argument(
        "--every", type=int, default=1, help="of the file operations, it is killed before one of so many"
    )
    parser.add_argument("--commands", nargs="*", default=[], help="that are killed at file operations; none: all")
    names = ["kills", "operations", *TABLES]
    parser.add_argument("--tables", nargs="*", default=names, help="these alone; others stay as the file has them")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="reliability-") as temporary:
        work = Path(temporary)
        for name, path in TABLES.items():
            if name in options.tables:
                result[name] = test_table(path, work)
        if "kills" in options.tables:
            result["kills"] = kill_table(work, options.kills, options.seed)
        if "operations" in options.tables:
            rows = operation_table(work, options.commands, options.every)
            made = {row["command"] for row in rows}
            result["operations"] = [row for row in result.get("operations", []) if row["command"] not in made] + rows
    result = {name: result[name] for name in names if name in result}
    print(*summary(result), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    kills = [each for name in ("kills", "operations") for row in result.get(name, []) for each in row["kills"]]
    looks = [each for row in result.get("operations", []) for each in row["looks"]]
    wrong = [each for each in kills if each["differ"]] + [
        each for each in looks if OF_NEITHER in each["readers"].values()
    ]
    failed = [row for name in TABLES for row in result.get(name, []) if row["outcome"] in ("failure", "error")]
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
