"""The table of docs/reliability.md, from benchmarks/results/reliability.jsonl.

python benchmarks/reliability/table.py
python benchmarks/reliability/table.py --write
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common import Result
from run_all import RESULTS, read

PAGE = Path(__file__).resolve().parents[2] / "docs/reliability.md"
BEGIN, END = "<!-- table: benchmarks/reliability/table.py --write -->", "<!-- end of the table -->"
# What was done, the tests that did it, and the peer's tests of the same.
ROWS: Sequence[tuple[str, Sequence[str], Sequence[str]]] = (
    ("kill -9 at any instant, then the same command", ["kill_anywhere"], ["peer_kill_between_steps"]),
    ("kill -9 at every system call", ["kill_at_syscalls"], ["peer_kill_in_save"]),
    ("order of sync, rename and removal", ["order"], []),
    ("no space left, or a write error, at every call", ["disk_full"], ["peer_disk_full"]),
    ("SIGTERM or Ctrl-C at any instant, one process", ["stop_anywhere"], ["peer_sigterm"]),
    ("SIGTERM or Ctrl-C at any instant, two processes", ["stop_anywhere_2_processes"], []),
    ("a rank killed or frozen", ["ranks"], []),
    ("resumed with something changed", ["wrong_resumes"], []),
    ("other numbers of processes and micro-batches", ["other_process_counts"], ["peer_two_processes"]),
    ("a second trainer on the same folder", ["second_trainer"], []),
    ("hostile images and captions", ["hostile_images"], ["peer_bad_data"]),
    ("mutated files", ["fuzz_files"], []),
)


def tally(lines: Sequence[Result], tests: Sequence[str]) -> tuple[int, int] | None:
    """Trials and failures of these tests; None where none of them was made."""
    found = [line for line in lines if line.get("summary") and line["test"] in tests and not line.get("skipped")]
    return (sum(line["n"] for line in found), sum(line["failures"] for line in found)) if found else None


def table(lines: Sequence[Result]) -> str:
    """Markdown: trials and failures of each test, and of diffusers' script where it was put to the same."""
    rows = ["| | trials | failures | `train_text_to_image.py` |", "|---|---:|---:|---|"]
    for name, ours, theirs in ROWS:
        mine, other = tally(lines, ours), tally(lines, theirs)
        n, failures = map(str, mine) if mine else ("not made", "")
        rows.append(f"| {name} | {n} | {failures} | {f'fails {other[1]} of {other[0]}' if other else ''} |")
    return "\n".join(rows)


def machines(lines: Sequence[Result]) -> str:
    """On what, and for how long."""
    made = [line for line in lines if "machine" in line and "seconds" in line]
    kinds = dict.fromkeys(
        f"{found['processor']}, {found['cores']} cores, {found['system']}, Python {found['python']}, torch"
        f" {found['torch']}, diffusers {found['diffusers']}"
        for found in (line["machine"] for line in made)
    )
    return f"{'; '.join(kinds)}. {round(sum(line['seconds'] for line in made) / 60)} minutes in all."


def written(page: str, lines: Sequence[Result]) -> str:
    """The page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: the marks {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{table(lines)}\n\n{machines(lines)}\n\n{END}{after}"


def main() -> None:
    lines = read(RESULTS)
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(PAGE.read_text(), lines))
    else:
        print(f"{table(lines)}\n\n{machines(lines)}")


if __name__ == "__main__":
    main()
