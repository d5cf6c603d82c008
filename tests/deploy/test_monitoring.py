"""The dashboard and the alerts: that they ask for what there is, and that each alert fires when it should."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.messages import Hello, Rejected
from relayd.auth.tokens import TokenRegistry
from relayd.http.prometheus import HttpReading, Scrape
from relayd.stats.counters import count
from tests.support.fake_worker import fake_worker, samples
from tests.support.relay import a_submit, daemon, peer

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana.json"
RULES = ROOT / "deploy" / "prometheus-rules.yml"
RULE_TESTS = Path(__file__).parent / "rules.test.yml"
DOCUMENT = ROOT / "docs" / "metrics.md"
CONFIG = ROOT / "deploy" / "prometheus.yml"
#: Set by Prometheus, whatever is scraped.
FROM_PROMETHEUS = {"up"}
ITS_LABELS = {"job", "instance", "le"}
#: What Grafana puts in.
VARIABLES = {"$job": "relayd", "$instance": ".*", "$space": ".*", "$__rate_interval": "5m"}


def promtool(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it; what it says is in the assertion where it finds a fault."""
    return subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)


def values_of(tree: Any, *keys: str) -> Iterator[str]:
    """Every text under one of `keys`, however deep."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in keys and isinstance(value, str):
                yield value
            yield from values_of(value, *keys)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, *keys)


def dashboard_queries() -> list[str]:
    """PromQL of the dashboard, with Grafana's variables filled in."""
    found = list(values_of(json.loads(DASHBOARD.read_text()), "expr"))
    for name, value in VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    assert len(found) > 40
    return found


def rule_queries() -> str:
    """The rules, without their words to people."""
    return re.sub(r"^ *(summary|action|#).*$", "", RULES.read_text(), flags=re.MULTILINE)


async def told(tmp_path: Path) -> dict[str, set[str]]:
    """Every sample of a relay that has seen something of everything, and the names of its labels."""
    async with daemon(tmp_path, talk={"reply": "check"}) as relay, peer(relay.url, "client") as client:
        async with fake_worker(relay.url) as worker:
            client.send(submit := a_submit())
            worker.speak(await worker.assigned(), [samples(100)])
            await client.frames(submit)
        for wrong in (a_submit(""), a_submit(space="nothing")):
            client.send(wrong)
            await client.next(Rejected)
        client.send(late := a_submit(queue_timeout_s=0.01))
        await client.frames(late)
        tokens = TokenRegistry()
        tokens.log_in(Hello(version=1, role="client", token="wrong"), None, 0.0)
        count(relay.relay.stats.talk.unspoken, "no_worker")
        families = Scrape.of(relay.relay, tokens, HttpReading(0, 0, {200: 1})).families
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:relayd|process)_[a-z_]+|\bup\b", query))


@pytest.mark.trio
async def test_every_metric_of_the_dashboard_and_the_alerts_is_there_with_its_labels(tmp_path: Path) -> None:
    there = await told(tmp_path)
    variables = " ".join(values_of(json.loads(DASHBOARD.read_text()), "definition"))
    for query in (*dashboard_queries(), *document_queries(), variables, rule_queries()):
        assert names_in(query) - FROM_PROMETHEUS <= there.keys(), query
        for name, matchers in re.findall(r"\b((?:relayd|process)_[a-z_]+){([^}]*)}", query):
            labels = set(re.findall(r"(\w+) *=", matchers))
            assert labels <= there[name] | ITS_LABELS, (name, matchers)


@pytest.mark.trio
async def test_every_metric_of_the_relay_is_on_the_dashboard(tmp_path: Path) -> None:
    there = {re.sub("_(bucket|count|sum)$", "", name) for name in await told(tmp_path) if name.startswith("relayd_")}
    shown = {re.sub("_bucket$", "", name) for query in dashboard_queries() for name in names_in(query)}
    assert there - shown == {"relayd_build_info"}


def document_queries() -> list[str]:
    """PromQL of docs/metrics.md."""
    questions = DOCUMENT.read_text().partition("| question | PromQL |")[2].partition("\n\n")[0]
    found = re.findall(r"\| `(.+)` \|$", questions, re.MULTILINE)
    assert len(found) > 4
    return found


def test_prometheus_can_read_every_query(tmp_path: Path) -> None:
    queries = dashboard_queries() + document_queries()
    rules = [f"      - {{record: 'a:b', expr: {json.dumps(query)}}}" for query in queries]
    path = tmp_path / "rules.yml"
    path.write_text("\n".join(["groups:", "  - name: dashboard", "    rules:", *rules]))
    done = promtool("check", "rules", "--lint=none", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_no_fault_in_the_rules() -> None:
    done = promtool("check", "rules", "--lint-fatal", str(RULES))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", str(RULE_TESTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_test_in_which_it_fires() -> None:
    tests = RULE_TESTS.read_text()
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert alerts
    assert [name for name in alerts if not re.search(rf"alertname: {name}\n +exp_alerts:\n", tests)] == []


def test_the_example_of_a_configuration_is_taken(tmp_path: Path) -> None:
    (tmp_path / "relayd.token").write_text("rly_c_1")
    (tmp_path / "relayd.yml").write_text(RULES.read_text())
    text = CONFIG.read_text()
    for old, new in {
        "/etc/prometheus/rules/relayd.yml": "relayd.yml",
        "/etc/prometheus/relayd.token": "relayd.token",
    }.items():
        assert old in text
        text = text.replace(old, str(tmp_path / new))
    path = tmp_path / "prometheus.yml"
    path.write_text(text)
    done = promtool("check", "config", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'job="relayd"' in RULES.read_text()
    assert "job_name: relayd" in text
