"""One model as it is to be served: what `qtool plan` says of one card, context and number of users."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from qtool import QtoolError
from qtool.sizing.accelerators import Accelerator, choose, load_accelerators, own_card
from qtool.sizing.fit import Estimate, Setting, largest_context
from qtool.sizing.headers import Headers, read_headers
from qtool.sizing.plan import Answer, Question, make_plan
from qtool.sizing.serve_command import command

USERS = 8


@dataclass(frozen=True)
class Deployment:
    """``context`` tokens to each of ``users`` sequences at once; ``estimate``: bytes and seconds of that."""

    headers: Headers
    setting: Setting
    context: int
    users: int
    estimate: Estimate

    @property
    def where(self) -> str:
        """`2 x L40S`."""
        return f"{self.setting.cards} x {self.setting.card.key}"

    def argv(self, place: str | None = None) -> list[str]:
        """What starts the engine, word by word. ``place``: where the model lies then (a folder or a Hub id), if not
        where it was planned."""
        headers = self.headers
        if place is not None:
            file = Path(place) / headers.gguf.name if headers.gguf else None
            headers = replace(headers, place=place, gguf=file, revision=None)
        typed = command(headers, self.setting, self.context, self.users, None)
        return shlex.split(typed.split("   (")[0])


def deployment(
    model: str, card: Accelerator, cards: int = 1, context: int | None = None, users: int | None = None,
    kv_dtype: str | None = None, engine: str | None = None,
) -> Deployment:  # fmt: skip
    """``context`` None: the longest that ``users`` (`USERS`) can have at once; ``engine`` None: the format's own.
    Raises QtoolError where the engine refuses it or it does not fit, with what would."""
    headers = read_headers(model)
    number = users or USERS
    question = Question([card], cards, sequences=(number,), kv_dtypes=(kv_dtype,) if kv_dtype else (), engine=engine,
                        formats=() if headers.quantized else ("source",))  # fmt: skip
    if context is None:
        first = _answer(headers, replace(question, contexts=(1,)))
        context = largest_context(first.setting, number) or 1
    answer = _answer(headers, replace(question, contexts=(context,)))
    cell = answer.smallest
    if not cell.fits:
        short = f"needs {cell.total / 2**30:.2f} GiB of {cell.limit / 2**30:.2f} on each card"
        raise QtoolError(
            f"{model}: {context:,} tokens x {number} {short} of {cards} x {card.key}. "
            f"It would fit with {', or '.join(answer.least_changes) or 'fewer users or a shorter context'}."
        )
    return Deployment(headers, answer.setting, context, number, cell)


def _answer(headers: Headers, question: Question) -> Answer:
    plan = make_plan(headers, question)
    if not plan.answers:
        raise QtoolError(f"{headers.name}: {'; '.join(plan.notes)}")
    answer = plan.answers[0]
    if answer.faults:
        raise QtoolError(f"{headers.name}: {answer.setting.engine} does not serve it: {'; '.join(answer.faults)}")
    return answer


def card_named(name: str | None, own: Path | None) -> Accelerator:
    """The card that a user names (None: the one of this machine). Raises QtoolError naming those known."""
    known = load_accelerators(own)
    found = choose(known, name or own_card(known))
    if len(found) != 1:
        raise QtoolError(f"--gpu: name one card, such as {found[0].key}; this machine has none that qtool knows.")
    return found[0]
