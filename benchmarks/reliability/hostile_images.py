"""Hostile images and captions, looked at as a run looks at its samples: each is refused by name, or has its pixels.

    python benchmarks/reliability/hostile_images.py

What they are, and what must become of each, is in tests/hostile_files.py. They are looked at three times: with caption
files beside them, listed in a metadata.jsonl, and in a tar.
"""

import sys

from common import Trials, machine, parser, workplace
from forks import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from hostile_files import images
from hostile_looks import LAYOUTS, looked_at


def main() -> int:
    given = parser(__doc__, None).parse_args()
    trials, items = Trials("hostile_images"), list(images())
    with workplace(given.work) as work:
        for layout in LAYOUTS:
            for result in looked_at(work / layout / "images", items, layout):
                trials.line(layout=layout, **result)
    return trials.summary(images=len(items), machine=machine())


if __name__ == "__main__":
    sys.exit(main())
