"""The numbers of docs/architecture.md: modules a folder, imports between them, arrows between rooms, climbs, circles.

python scripts/count_rooms.py                 # this checkout
python scripts/count_rooms.py ../an-older-one # another one with the same rooms, by this one's order of them
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def main() -> None:
    from imports import ROOT, imports, module_of, modules, packages
    from test_layers import DOWNHILL, circle, climbs, wing_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    folders = packages(parser.parse_args().checkout.resolve())
    known = modules(folders)
    arrows = {
        (module, target)
        for module, path in known.items()
        for one in imports(path.read_text(encoding="utf-8"))
        if (target := module_of(one.target, known)) not in (None, module, "qtool")
    }
    rooms = {(wing_of(one), wing_of(other)) for one, other in arrows if wing_of(one) != wing_of(other)}
    for stage in DOWNHILL:
        inside = [module for module in known if wing_of(module)[0] == stage]
        shown = Counter(str(known[module].parent.name) for module in inside)
        inner = sum(wing_of(one)[0] == stage == wing_of(other)[0] for one, other in arrows)
        print(f"{stage or 'pipeline'}: {len(inside)} modules, {inner} imports among them; {dict(shown)}")
    print(f"arrows between rooms: {len(rooms)}")
    print(f"arrows that climb: {len(climbs(folders, DOWNHILL))}")
    print(f"circles: {'none' if not circle(folders) else ' -> '.join(circle(folders))}")


if __name__ == "__main__":
    main()
