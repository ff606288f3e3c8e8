"""`qtool check` as JUnit XML, for machines that run it after every change."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

from qtool.report.markup import spelt
from qtool.runs.gates import GateResult
from qtool.runs.record import RunRecord


def as_junit(run: RunRecord, results: Sequence[GateResult]) -> str:
    """JUnit XML as Jenkins, GitLab and GitHub's actions read it; undecided gates that only warn are `skipped`."""
    failures = sum(result.failed for result in results)
    skipped = sum(result.verdict == "undecided" and not result.failed for result in results)
    counts = {"tests": str(len(results)), "failures": str(failures), "errors": "0"}
    top = ET.Element("testsuites", counts | {"time": "0"})
    stamp = run.finished.removesuffix("+00:00")
    name = spelt(f"qtool check {run.lock.source.name}")
    about = {"name": name, "timestamp": stamp, "time": "0", "hostname": "qtool"}
    suite = ET.SubElement(top, "testsuite", about | counts | {"skipped": str(skipped)})
    for result in results:
        case = {"classname": spelt(f"qtool.{result.output}"), "name": spelt(result.gate), "time": "0"}
        node = ET.SubElement(suite, "testcase", case)
        if result.failed:
            said = {"message": spelt(result.reason), "type": result.verdict}
            ET.SubElement(node, "failure", said).text = spelt(result.reason)
        elif result.verdict == "undecided":
            ET.SubElement(node, "skipped", {"message": spelt(f"undecided: {result.reason}")})
        else:
            ET.SubElement(node, "system-out").text = spelt(result.reason)
    ET.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(top, encoding="unicode") + "\n"
