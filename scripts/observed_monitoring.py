"""The bundle's monitoring in a real Prometheus, and its load script run to its end, for check_observed.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from observed_findings import Findings

from qtool.bundle.bundle import make_bundle, write_bundle
from qtool.serve import process
from qtool.serve.here import server_here
from qtool.sizing.serving import PlannedServer

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def monitored(findings: Findings, planned: PlannedServer, url: str, work: Path) -> None:
    """The bundle's alert rules in a real Prometheus, the dashboard's queries put to it while the load script runs."""
    card = server_here(planned.headers.place, "L40S", users=4)
    folder = work / "bundle"
    write_bundle(make_bundle(Path(planned.headers.place), card, None, folder), folder)
    program = shutil.which("prometheus")
    if program is None:
        findings.said.append("Not run: the dashboard's queries (no prometheus here).")
        return
    port = process.free_port()
    told = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "alerts.yaml")],
        "scrape_configs": [{"job_name": "engine", "static_configs": [{"targets": [url.removeprefix("http://")]}]}],
    }
    (work / "prometheus.yml").write_text(yaml.safe_dump(told), encoding="utf-8")
    words = (program, f"--config.file={work / 'prometheus.yml'}", f"--storage.tsdb.path={work / 'tsdb'}",
             f"--web.listen-address=127.0.0.1:{port}")  # fmt: skip
    here = f"http://127.0.0.1:{port}"
    with process.start("prometheus", words, {}, here, "/-/ready", 60.0):
        script(findings, folder, planned, url)
        time.sleep(3.0)
        panels = json.loads((folder / "dashboard.json").read_text(encoding="utf-8"))["panels"]
        queries = [target["expr"] for panel in panels for target in panel["targets"]]
        empty = [query for query in queries if not answered(here, query)]
        findings.expect(
            not empty, f"prometheus answers {len(queries)} of the dashboard's queries; empty: {empty or 'none'}"
        )
        rules = ask_json(f"{here}/api/v1/rules")["data"]["groups"][0]["rules"]
        sick = [rule["name"] for rule in rules if rule["health"] != "ok"]
        findings.expect(not sick, f"prometheus evaluates {len(rules)} alert rules; unhealthy: {sick or 'none'}")
        version = ask_json(f"{here}/api/v1/status/buildinfo")["data"]["version"]
        findings.said.append(f"Prometheus {version} answered all {len(queries)} queries of the dashboard and evaluated "
                             f"{len(rules)} alert rules, scraping this server.")  # fmt: skip


def answered(here: str, query: str) -> bool:
    """With a number."""
    found = ask_json(f"{here}/api/v1/query?{urllib.parse.urlencode({'query': query})}")["data"]["result"]
    return bool(found) and all(row["value"][1] != "NaN" for row in found)


def ask_json(url: str) -> Any:
    """The answer of a server of this machine."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return json.load(answer)


def script(findings: Findings, folder: Path, planned: PlannedServer, url: str) -> None:
    """The bundle's load.sh, with fewer requests."""
    text = (folder / "load.sh").read_text(encoding="utf-8")
    text = re.sub(r"--requests \d+", "--requests 16", re.sub(r"--num-prompts \d+", "--num-prompts 16", text))
    text = text.replace("--ttft", "--no-log --ttft")
    file = folder / "short.sh"
    file.write_text(text, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh", str(file)], env=os.environ | ENVIRONMENT | {"URL": url, "PATH": path},
                          capture_output=True, text=True, check=False)  # fmt: skip
    benched = "Request goodput" in done.stdout
    how = "ran" if benched else f"did not run: {(done.stdout + done.stderr)[-400:]}"
    right = done.returncode == 0 and benched
    findings.expect(right, f"the bundle's load script: exit {done.returncode}, vllm bench serve {how}")
