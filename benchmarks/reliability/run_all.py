"""Runs every proof of this folder in full, and keeps what it printed in benchmarks/results/reliability.jsonl.

    python benchmarks/reliability/run_all.py --peer train_text_to_image.py
    python benchmarks/reliability/run_all.py --only kill_anywhere --only order
    python benchmarks/reliability/run_all.py --n 2 --results /tmp/short.jsonl

In the file each line has the script it is from; the first of each script tells the machine and the seconds that all of
it took. Scripts that are not run keep the lines that are there. Exit code 1 where anything of ours failed. Then
`python benchmarks/reliability/table.py --write` puts the figures into docs/reliability.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from common import Result, machine
from forks import environment

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results/reliability.jsonl"
PROOFS: dict[str, list[str]] = {
    "kill_anywhere": ["kill_anywhere.py"],
    "kill_at_syscalls": ["kill_at_syscalls.py"],
    "order": ["order.py"],
    "disk_full": ["disk_full.py"],
    "stop_anywhere": ["stop_anywhere.py"],
    "stop_anywhere_2": ["stop_anywhere.py", "--processes", "2"],
    "ranks": ["ranks.py"],
    "wrong_resumes": ["wrong_resumes.py"],
    "other_process_counts": ["other_process_counts.py"],
    "second_trainer": ["second_trainer.py"],
    "hostile_images": ["hostile_images.py"],
    "fuzz_files": ["fuzz_files.py"],
    "peer": ["peer.py"],
}


def read(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(name: str, more: list[str]) -> tuple[int, list[Result]]:
    """Runs one script; its exit code, and its lines."""
    begun, found = time.monotonic(), []
    line = [sys.executable, str(HERE / PROOFS[name][0]), *PROOFS[name][1:], *more]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(f"{name}: {text.rstrip()}", file=sys.stderr, flush=True)
            found.append({"script": name, **json.loads(text)})
    facts = {"seconds": round(time.monotonic() - begun), "machine": machine(), "code": process.returncode}
    return process.returncode, [{"script": name, **facts}, *found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*PROOFS], help="this one, several times for several")
    parser.add_argument("--n", type=int, help="trials of each, in the place of all")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance (0)")
    parser.add_argument("--peer", type=Path, help="diffusers' train_text_to_image.py; without it, it is not run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    chosen = options.only or [name for name in PROOFS if name != "peer" or options.peer]
    lines, codes = read(options.results), []
    for name in chosen:
        more = ["--seed", str(options.seed), *(["--n", str(options.n)] if options.n is not None else [])]
        code, found = run(name, more + (["--script", str(options.peer)] if name == "peer" else []))
        codes.append(code)
        lines = [line for line in lines if line["script"] != name] + found
        order = [*PROOFS]
        lines.sort(key=lambda line: order.index(line["script"]))
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
