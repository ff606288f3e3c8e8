#!/usr/bin/env python3
"""The files of `qtool bundle` before what reads them: schemas, promtool, docker compose, vllm-project/recipes' build.

The demo model is quantized here (or taken from --work), a bundle of each kind of engine is written, and every file is
put to its reader. A schema that allows any key would take a misspelt one: keys that it does not name fail, too. A fault
is planted in each file, and must be refused, or the check proves nothing.

The schemas belong to their projects and are not in this repository: --schemas is a folder with the files of SOURCES,
each as `git show COMMIT:PATH` gives it (other bytes are refused), and --recipes a checkout of vllm-project/recipes with
`npm install js-yaml`. What is not given is named as not checked.

Exit codes: 0 all is taken and every planted fault refused, 1 something is not, 2 wrong input.

Examples:
  python scripts/check_bundle.py --schemas schemas --recipes recipes --write docs/observing.md
  python scripts/check_bundle.py --work bundles --schemas schemas
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from bundle_schemas import SOURCES, Source, faults, schema_of, unknown
from vllm_table import write_into

import qtool
from qtool import QtoolError
from qtool.bundle.bundle import Bundle, make_bundle, write_bundle
from qtool.evaluate.engines.table import SERVERS
from qtool.serve.here import server_here

REPOSITORY, NAME = "my-org/Demo-AWQ", "qtool-demo-awq"
CALIBRATION = {"text": "qtool-code", "samples": 8, "length": 64}


RECIPES = Source("vllm-project/recipes", "scripts/build-recipes-api.mjs", "8959cf64189c", "2026-08-21", "")
# What is planted into a file, to be refused: where, and what.
FAULTS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "production-stack.yaml": (("servingEngineSpec", "modelSpec", 0, "vllmConfig", "maxModelLen"), "long"),
    "llm-d.yaml": (("decode", "parallelism", "tensor"), "two"),
    "kserve.yaml": (("spec", "model", "uri"), 7),
    "compose.yaml": (("services", "engine", "restarts"), "always"),
}


@dataclass(frozen=True)
class Result:
    """One file and reader. ``said``: empty where all is well; ``planted``: whether the planted fault was refused."""

    engine: str
    file: str
    reader: str
    said: str
    planted: bool | None = None

    @property
    def good(self) -> bool:
        return not self.said and self.planted is not False


def bundles(work: Path) -> list[tuple[str, Bundle, Path]]:
    """(engine, bundle, its folder): AWQ for vLLM, GGUF for llama.cpp."""
    made = qtool.convert("qtool-demo", ["awq", "gguf"], CALIBRATION, folder=work)
    found = []
    for output, card, repository in (("awq", "L40S", REPOSITORY), ("gguf", "RTX4090", None)):
        folder = made[output].path / "serve"
        server = server_here(str(made[output].path), card, users=8)
        bundle = make_bundle(made[output].path, server, repository, folder)
        write_bundle(bundle, folder)
        checks = [
            check for check in qtool.verify(made[output].path).checks if check.status == "fail" and check.required
        ]
        if checks:
            raise QtoolError(f"{folder}: with it the artifact fails verify: {checks[0].detail}")
        found.append((bundle.target.server.facts.name, bundle, folder))
    return found


def of_schemas(engine: str, folder: Path, schemas: Path) -> Iterator[Result]:
    """Each YAML file whose schema is there."""
    for name, (place, wrong) in FAULTS.items():
        key = next(source for source in SOURCES if source.split(".")[0] == name.split(".")[0])
        if not (folder / name).is_file():
            continue
        schema = schema_of(SOURCES[key].read(schemas, key))
        data = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        planted = copy.deepcopy(data)
        inner = planted
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = wrong
        said = [*faults(data, schema), *(f"no key {key}" for key in unknown(data, schema))]
        yield Result(engine, name, f"{SOURCES[key].repository} {SOURCES[key].path}, {SOURCES[key].commit} "
                     f"({SOURCES[key].date})", "; ".join(said), bool(faults(planted, schema)))  # fmt: skip


def ran(words: list[str], cwd: Path | None = None) -> str:
    """Empty where it ended well, else what it said last."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return "" if done.returncode == 0 else f"exit {done.returncode}: {lines[-1][:160] if lines else ''}"


def of_programs(engine: str, folder: Path, work: Path) -> Iterator[Result]:
    """promtool, docker compose, sh: those that are here."""
    alerts = folder / "alerts.yaml"
    if promtool := shutil.which("promtool"):
        broken = work / "broken.yaml"
        broken.write_text(alerts.read_text(encoding="utf-8").replace("sum(", "summ(", 1), encoding="utf-8")
        name = _version([promtool, "--version"])
        yield Result(engine, "alerts.yaml", f"{name}, check rules", ran([promtool, "check", "rules", str(alerts)]),
                     bool(ran([promtool, "check", "rules", str(broken)])))  # fmt: skip
        yield from _fired(engine, alerts, promtool, work)
        queries = work / "queries.yaml"
        queries.write_text(yaml.safe_dump(_as_rules(folder / "dashboard.json")), encoding="utf-8")
        yield Result(engine, "dashboard.json", f"{name}, its queries as rules",
                     ran([promtool, "check", "rules", str(queries)]))  # fmt: skip
    if compose := shutil.which("docker-compose"):
        plain, broken = work / "compose.yaml", work / "broken-compose.yaml"
        text = (folder / "compose.yaml").read_text(encoding="utf-8")
        plain.write_text(text.replace("\nname:", "\n# name:"), encoding="utf-8")  # version 1 does not know it yet
        broken.write_text(plain.read_text(encoding="utf-8").replace("restart:", "restarts:"), encoding="utf-8")
        yield Result(engine, "compose.yaml", f"{_version([compose, '--version'])}, config, without `name`",
                     ran([compose, "-f", str(plain), "config", "-q"]),
                     bool(ran([compose, "-f", str(broken), "config", "-q"])))  # fmt: skip
    yield Result(engine, "load.sh", "sh -n", ran(["sh", "-n", str(folder / "load.sh")]))


def _version(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return " ".join((done.stdout or done.stderr).split("\n")[0].replace(",", "").split()[:3])


def _as_rules(dashboard: Path) -> dict[str, Any]:
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [{"record": f"query_{number}", "expr": expr} for number, expr in enumerate(expressions)]
    return {"groups": [{"name": "queries", "rules": rules}]}


def _fired(engine: str, alerts: Path, promtool: str, work: Path) -> Iterator[Result]:
    """`promtool test rules`: series of a server in trouble, and which alerts they must set off; another model's trouble
    must set off none, where lines say whose they are."""
    rules = {rule["alert"]: rule for rule in yaml.safe_load(alerts.read_text(encoding="utf-8"))["groups"][0]["rules"]}
    metrics = SERVERS[engine].metrics
    assert metrics is not None
    mine, other = (f'{{{metrics.label}="{name}"}}' if metrics.label else "" for name in (NAME, "another"))
    wanted = ["Queue", "ServerGone"]
    trouble = [(metrics.waiting, "3x30")]
    if metrics.preempted:
        trouble += [(metrics.preempted, "0+2x30"), (metrics.cache, "0.99x30")]
        wanted += ["CacheThrashing", "CacheFull"]
    cases = [(mine, wanted)] + ([(other, ["ServerGone"])] if metrics.label else [])
    tests = []
    for whose, fire in cases:
        series = [{"series": name + whose, "values": values} for name, values in trouble]
        expected = [{"alertname": name, "eval_time": "15m", "exp_alerts": [_alert(rules[name])] * (name in fire)}
                    for name in rules]  # fmt: skip
        tests.append({"interval": "1m", "input_series": series, "alert_rule_test": expected})
    file = work / "fired.yaml"
    told = {"rule_files": [str(alerts.resolve())], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(told), encoding="utf-8")
    said = f"promtool test rules: {', '.join(wanted)} fire, no other" + ("; another model's do not" if other else "")
    yield Result(engine, "alerts.yaml", said, ran([promtool, "test", "rules", str(file)]))


def _alert(rule: dict[str, Any]) -> dict[str, Any]:
    return {"exp_labels": rule["labels"], "exp_annotations": rule["annotations"]}


def of_recipes(bundle: Bundle, checkout: Path) -> Result:
    """Their own build reads it, and the command that it makes of it has every planned flag."""
    text = bundle.files["recipe.yaml"]
    place = checkout / "models" / f"{REPOSITORY}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)

    def built(recipe: str) -> str:
        place.write_text(recipe, encoding="utf-8")
        try:
            return ran(["node", "scripts/build-recipes-api.mjs"], checkout)
        finally:
            place.unlink()

    planted = bool(built(text + "features:\n  x:\n    modes: {}\n"))
    said = built(text)
    rendered = json.loads((checkout / "public" / f"{REPOSITORY}.json").read_text(encoding="utf-8"))
    command = json.dumps(rendered)
    flags = [flag for flag in yaml.safe_load(text)["model"]["base_args"] if flag.startswith("--")]
    lost = [flag for flag in flags if flag not in command]
    said = said or (f"its command lacks {', '.join(lost)}" if lost else "")
    return Result("vllm", "recipe.yaml", f"{RECIPES.repository} {RECIPES.path}, {RECIPES.commit} ({RECIPES.date})",
                  said, planted)  # fmt: skip


def table(results: list[Result], not_checked: list[str]) -> str:
    """Markdown."""
    lines = ["| engine | file | read by | said | a planted fault |", "|---|---|---|---|---|"]
    planted = {None: "", True: "refused", False: "NOT SEEN"}
    lines += [f"| {r.engine} | {r.file} | {r.reader} | {r.said or 'taken'} | {planted[r.planted]} |" for r in results]
    return "\n".join([*lines, *(["", *(f"Not checked: {text}." for text in not_checked)] if not_checked else [])])


def check(args: argparse.Namespace, work: Path) -> int:
    """Write, read, say."""
    results: list[Result] = []
    not_checked = ["llama-server.ini and Modelfile were read by no program; no container was started and no chart "
                   "installed"]  # fmt: skip
    for engine, bundle, folder in bundles(work):
        if args.schemas and importlib.util.find_spec("jsonschema"):
            results += of_schemas(engine, folder, args.schemas)
        results += of_programs(engine, folder, work)
        if args.recipes and "recipe.yaml" in bundle.files:
            results.append(of_recipes(bundle, args.recipes))
    lacking: list[tuple[str, Callable[[], bool]]] = [
        ("schemas (--schemas, jsonschema)", lambda: any("schema" in r.reader for r in results)),
        ("alert rules and queries (promtool)", lambda: any("promtool" in r.reader for r in results)),
        ("docker-compose config", lambda: any("compose version" in r.reader for r in results)),
        ("recipe.yaml (--recipes)", lambda: any(r.file == "recipe.yaml" for r in results)),
    ]
    not_checked += [name for name, done in lacking if not done()]
    text = table(results, not_checked)
    print(text)
    if args.write:
        write_into(args.write, "files", text, "check_bundle")
    return 0 if all(result.good for result in results) else 1


def main() -> None:
    """Parse the command line and exit with the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, metavar="DIR", help="the files of SOURCES")
    parser.add_argument("--recipes", type=Path, metavar="DIR", help="a checkout of vllm-project/recipes with js-yaml")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep artifacts here; those that are there are taken")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table between its marks")
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
