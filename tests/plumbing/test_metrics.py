"""Metrics: what several processes count is summed up, and the dashboard asks for what there is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import messenger
from plumbing import metrics
from support.people import Person
from support.servers import ROOT

DASHBOARD = json.loads((ROOT / "deploy/grafana.json").read_text(encoding="utf-8"))
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SHOWN = re.findall(r"```promql\n(.*?)```", OPERATIONS, re.DOTALL)
COUNTING = """
from plumbing import metrics
metrics.observe_request("login", 200, 0.5)
metrics.CONNECTIONS.set(3)
metrics.DATABASE.set(1)
print("counted", flush=True)
input()
"""

Sample = tuple[str, dict[str, str], float]


def samples(text: bytes) -> list[Sample]:
    """Read an exposition as Prometheus does."""
    families = text_string_to_metric_families(text.decode())
    return [(name, labels, value) for family in families
            for name, labels, value, *_ in family.samples]


def value_of(folder: Path, name: str, **labels: str) -> float:
    """Answer the one value that a name and labels have in what is served of a folder."""
    [value] = [value for found, with_labels, value in samples(metrics.exposition(folder))
               if (found, with_labels) == (name, labels)]
    return value


def start_counting(folder: Path) -> subprocess.Popen[str]:
    """Start a process that counts a login and three connections, and goes on until it is told."""
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING], cwd=ROOT, env=os.environ | metrics.environment(folder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "counted\n"
    return process


def test_processes_are_summed_up_and_those_that_ended_have_nothing_open(tmp_path: Path) -> None:
    """Two processes are served as their sum. When one has ended, what it did stays counted, and
    what it had open does not."""
    first, second = start_counting(tmp_path), start_counting(tmp_path)
    login = {"operation": "login", "status": "200"}
    try:
        assert value_of(tmp_path, "messenger_request_seconds_count", **login) == 2
        assert value_of(tmp_path, "messenger_database_connections") == 6
        first.communicate("\n", timeout=20)
        metrics.forget_process(tmp_path, first.pid)
        assert value_of(tmp_path, "messenger_request_seconds_count", **login) == 2
        assert value_of(tmp_path, "messenger_request_seconds_sum", **login) == 1
        assert value_of(tmp_path, "messenger_database_connections") == 3
        assert value_of(tmp_path, "messenger_database_up") == 1
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.fixture
async def served(alice: Person, bob: Person) -> list[Sample]:
    """What is served of this process, once people have logged in and posted."""
    await alice.says(await alice.opens(bob), "hello")
    return [sample for sample in samples(metrics.exposition())
            if sample[0].startswith("messenger_")]


def names_of(samples: list[Sample]) -> set[str]:
    """Answer the names without what a histogram and a counter put behind them."""
    return {re.sub("_(bucket|count|sum|total|created)$", "", name) for name, _, _ in samples}


def labels_in(expression: str) -> set[str]:
    """Answer the labels that an expression groups by or selects by."""
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    return set(re.findall(r"(\w+)=", expression)) | set(re.findall(r"\w+", " ".join(grouped)))


def test_dashboard_asks_for_what_is_served(served: list[Sample]) -> None:
    """Each name in the dashboard, and in the query of docs/operations.md, is that of a served
    sample, which has the labels that go with it; and of each metric something is shown."""
    assert SHOWN
    shown = set()
    for expression in [*EXPRESSIONS, *SHOWN]:
        names = set(re.findall(r"messenger_\w+", expression))
        assert names, expression
        for name in names:
            known: list[Any] = [labels for found, labels, _ in served if found == name]
            assert known, f"{name} is not served"
            assert all(labels_in(expression) <= labels.keys() for labels in known), expression
        shown |= {sample for sample, _, _ in served if sample in names}
    assert names_of([(name, {}, 0) for name in shown]) == names_of(served)


def test_dashboard_selects_values_that_occur(served: list[Sample]) -> None:
    """A label that is compared with one value has that value in what is served."""
    compared = {pair for expression in EXPRESSIONS
                for pair in re.findall(r'(\w+)="(\w+)"', expression)}
    assert ("operation", "login") in compared
    assert compared <= {pair for _, labels, _ in served for pair in labels.items()}


def test_page_of_operations_names_each_metric(served: list[Sample]) -> None:
    """docs/operations.md has each metric in its table, and none that is not served."""
    told = re.findall(r"(?m)^\| `(messenger_\w+)", OPERATIONS)
    assert len(told) == len(set(told))
    known = {name for name, _, _ in served}
    assert {re.sub("_total$", "", name) for name in told} == names_of(served)
    assert all(name in known for name in told if name.endswith("_total"))


def test_page_of_operations_names_each_kind_of_commit(served: list[Sample]) -> None:
    """What docs/operations.md says of `kind` is what the writers of the messenger are counted by.
    """
    sentence = re.search(r"`kind` is\s([^.]+)\.", OPERATIONS)
    assert sentence is not None
    told = set(re.findall("`([^`]+)`", sentence[1]))
    assert told <= {labels["kind"] for _, labels, _ in served if "kind" in labels}
    assert len(told) == len(messenger.ChatWriter.__subclasses__())
