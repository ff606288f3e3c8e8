"""From a task to outcomes: prompts to the engine, its texts to the sandbox, everything in a journal."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from qtool import QtoolError
from qtool.evaluate.engines.engine import Answering, Decoding, Message, Request, sample_seed
from qtool.evaluate.journal import Journal, Place
from qtool.evaluate.sandbox.execute import Job, Outcome, run_programs
from qtool.evaluate.scorecard import Grade, ProblemOutcome
from qtool.evaluate.tasks import prompts
from qtool.evaluate.tasks.loading import as_job
from qtool.evaluate.tasks.problems import Problem, Task
from qtool.evaluate.tasks.prompts import Style


@dataclass(frozen=True)
class Asking:
    """How a task is put and judged. ``timeout``: seconds for one program; ``sandbox`` as `execute.run_programs`;
    ``known``: what programs judged so far came to, by `_digest`."""

    style: Style
    decoding: Decoding
    samples: int = 1
    seed: int = 0
    timeout: float = 5.0
    sandbox: str = "auto"
    known: dict[bytes, Outcome] = field(default_factory=dict, repr=False, compare=False)


Answers = dict[str, tuple[ProblemOutcome, ...]]  # problem id -> an outcome for each sample
Progress = Callable[[int, int], None]  # answered, judged


def answer_task(
    model: Answering, task: Task, asking: Asking, tokenizer: Any, journal: Journal,
    progress: Progress = lambda answered, judged: None,
) -> Answers:  # fmt: skip
    """Ask ``model`` every problem and judge its answers. ``tokenizer`` None: the engine applies templates itself.

    What the journal holds is not asked or judged again; what comes is in it before anything else happens. Raises
    QtoolError (exit 3) where the engine, the sandbox or a test itself failed: none is a wrong answer.
    """
    problems = {problem.task_id: problem for problem in task.problems}
    places = [(name, sample) for name in problems for sample in range(asking.samples)]
    texts_asked = [problem.prompt for problem in task.problems]
    if tokenizer is not None:
        texts_asked = prompts.render_all(task.problems, asking.style, tokenizer)
    asked = dict(zip(problems, texts_asked, strict=True))
    requests = [_request(problems[name], asked[name], sample, asking, tokenizer is None) for name, sample in places]
    done = {number for number, place in enumerate(places) if place in journal.judged or place in journal.texts}
    texts: queue.SimpleQueue[tuple[Place, str] | None] = queue.SimpleQueue()
    for item in journal.texts.items():
        texts.put(item)
    answered = len(done)

    def say() -> None:
        progress(answered, len(journal.judged))

    with ThreadPoolExecutor(max_workers=1) as judge:
        # A model on the CPU needs every core itself: torch's threads wait for each other, and programs beside them
        # slow it several times over. There the programs run when it is done; elsewhere, while it writes.
        wait = model.device == "cpu"
        judging: Future[None] = Future() if wait else judge.submit(_judge_all, texts, problems, asking, journal, say)
        try:
            for number, text in model.generate(requests, asking.decoding, done):
                journal.answered(places[number], text)
                texts.put((places[number], text))
                answered += 1
                say()
                if judging.done():  # it failed; no use in going on
                    break
        finally:
            texts.put(None)
        if wait:
            judging = judge.submit(_judge_all, texts, problems, asking, journal, say)
        judging.result()
    missing = [name for name, sample in places if (name, sample) not in journal.judged]
    if missing:
        raise QtoolError(f"{task.name}: engine {model.name} gave no answer to {missing[0]}.", exit_code=3)
    return {name: tuple(journal.judged[name, sample] for sample in range(asking.samples)) for name in problems}


def _request(problem: Problem, text: str, sample: int, asking: Asking, served: bool) -> Request:
    def finished(text: str) -> bool:
        return prompts.finished(text, asking.style, problem)

    seed = sample_seed(asking.seed, problem.task_id, sample)
    chat = served and asking.style == "chat"
    messages: tuple[Message, ...] = tuple(prompts.messages(problem)) if chat else ()
    return Request(text, finished, messages, seed)


def _judge_all(
    texts: queue.SimpleQueue[tuple[Place, str] | None], problems: dict[str, Problem], asking: Asking,
    journal: Journal, say: Callable[[], None],
) -> None:  # fmt: skip
    """Run programs as they come, as many at a time as are waiting, until None comes."""
    open_ = True
    while open_:
        waiting = [texts.get()]
        while not texts.empty():
            waiting.append(texts.get())
        open_ = None not in waiting
        answers = [item for item in waiting if item is not None]
        jobs = [_job(problems[place[0]], text, asking.style) for place, text in answers]
        outcomes = _judge(jobs, asking)
        grades = [_grade(outcome) for outcome in outcomes]
        judged = zip(answers, outcomes, grades, strict=True)
        journal.add(
            (place, ProblemOutcome(outcome=grade, detail=outcome.detail, completion=text))
            for (place, text), outcome, grade in judged
        )
        say()


def _judge(jobs: Sequence[Job], asking: Asking) -> list[Outcome]:
    """Outcomes in the order of ``jobs``. A quantized model often writes what its source wrote: a program that is equal
    to the letter is run once for one problem, so that chance in it cannot part two models. One that ran out of time is
    run again, for the machine may have been busy."""
    digests = [_digest(job) for job in jobs]
    fresh = {digest: job for digest, job in zip(digests, jobs, strict=True) if digest not in asking.known}
    outcomes = run_programs(list(fresh.values()), timeout=asking.timeout, sandbox=asking.sandbox)
    found = dict(zip(fresh, outcomes, strict=True))
    asking.known.update((digest, o) for digest, o in found.items() if o.outcome in ("passed", "failed"))
    return [found[digest] if digest in found else asking.known[digest] for digest in digests]


def _digest(job: Job) -> bytes:
    return hashlib.sha256(repr(job).encode()).digest()


def _grade(outcome: Outcome) -> Grade:
    """Raises QtoolError where nothing is known of the program: exit 3 if the sandbox failed, exit 2 if the problem's
    own test cannot run here, which no second run would change."""
    if outcome.outcome == "error":
        raise QtoolError(
            f"{outcome.task_id}: the sandbox failed ({outcome.detail}); no score was made. Run again to go on from "
            "here.",
            exit_code=3,
        )
    if outcome.outcome == "unjudged":
        raise QtoolError(
            f"{outcome.task_id}: this problem's own test cannot judge a program here ({outcome.detail}). No score was "
            "made, and running again gives the same: mend its test, or take the problem out of the task's file."
        )
    return outcome.outcome


def _job(problem: Problem, text: str, style: Style) -> Job:
    return as_job(problem, prompts.program(problem, text, style))
