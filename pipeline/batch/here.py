"""The engine `here`: no engine, this machine; one model after another."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from qtool.batch.engine import Engine, Place, Rendered, Task, here_command
from qtool.recipe.section import Section


class HereSection(Section):
    """`here:` this machine, one model after another. There is nothing to set."""


def _render(tasks: Sequence[Task], place: Place, section: HereSection) -> Rendered:
    lines = [
        "#!/bin/sh",
        "# Every model, one after another; one that fails stops no other, Ctrl-C does. After a kill run it again:",
        "# what is finished is reused. Ends with 1 where any failed.",
        "failed=0",
        'trap "exit 130" INT',
        'trap "exit 143" TERM',
        f"cd {shlex.quote(str(place.home))} || exit 3",
    ]
    for task in tasks:
        words = [*here_command(), "run", str(place.folder / task.file), *task.options(place.runs, given=False)]
        lines += ["", f"{shlex.join(words)} || failed=1"]
    lines += ["", 'exit "$failed"']
    return Rendered({"here.sh": "\n".join(lines) + "\n"}, [["sh", "here.sh"]])


HERE = Engine("here", HereSection, _render, "sh", "comes with the system")
