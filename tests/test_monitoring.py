"""Metrics, budgets and alerts: what Prometheus reads, what stops, what fires and what must not."""

import json
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import numpy
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from test_deployment import Parrot, TEXT, embed, eventually, look_up, opened

from llmbook.admission import Refusal
from llmbook.core import InputError, SettingsError
from llmbook.monitoring import (
    PANELS,
    RULES,
    Budget,
    BudgetSettings,
    PrometheusObserver,
    check_rules,
    estimate_quantile,
    find_metrics,
    list_metrics,
    read_metrics,
    write_alert_rules,
    write_monitoring_files,
    write_rule_tests,
)
from llmbook.protocol import Service, Ticket

ROOT = Path(__file__).resolve().parent.parent
VLLM = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
num_preemptions_total prompt_tokens_total generation_tokens_total request_success_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_prefill_time_seconds_bucket request_decode_time_seconds_bucket
request_prompt_tokens_bucket request_generation_tokens_bucket request_max_num_generation_tokens_bucket""".split()
OTEL = ("request_duration", "time_to_first_token", "time_per_output_token")


def scrape(house):
    return house.web.get("/metrics")


def test_exposition_has_the_promised_names_and_buckets():
    page = PrometheusObserver().render()[0].decode()
    names = list_metrics(page)
    assert {f"vllm:{name}" for name in VLLM} <= names
    assert {f"gen_ai_server_{name}_seconds_bucket" for name in OTEL} <= names
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total"} <= names


def test_metrics_of_real_requests():
    watch = PrometheusObserver()
    with opened(Service(Parrot(0.002), look_up, embed, count=len), watch) as house:
        house.web.post("/v1/completions", json=TEXT)
        house.web.post(
            "/v1/chat/completions",
            json={"model": "llmbook-chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        )
        house.web.post("/v1/embeddings", json={"model": "llmbook-encoder", "input": "abba"})
        house.web.post("/v1/answers", json={"question": "fails"})
        house.web.post("/v1/completions", json=TEXT | {"n": 2})
        house.web.get("/nothing/here")
        page = scrape(house)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    sums = read_metrics(page.text)
    assert sums["vllm:generation_tokens_total"] == 5 + 1 and sums["vllm:prompt_tokens_total"] == 5 + 2 + 4 + 5
    assert sums["vllm:e2e_request_latency_seconds_count"] == 4 and sums["vllm:time_to_first_token_seconds_count"] == 2
    assert sums["vllm:inter_token_latency_seconds_count"] == 4
    assert 0.002 * 4 <= sums["vllm:inter_token_latency_seconds_sum"] < 2
    reasons = {
        (s.labels["model_name"], s.labels["finished_reason"]): s.value
        for s in families["vllm:request_success"].samples
        if s.name.endswith("_total")
    }
    assert reasons == {("llmbook-chat", "stop"): 1, ("llmbook-chat", "length"): 1, ("llmbook-encoder", "stop"): 1}
    refused = {
        (s.labels["status"], s.labels["code"]): s.value
        for s in families["llmbook_requests_rejected"].samples
        if s.name.endswith("_total")
    }
    assert refused == {("400", "invalid_value"): 2, ("404", "not_found"): 1}
    operations = {
        s.labels["gen_ai_operation_name"] for s in families["gen_ai_server_request_duration_seconds"].samples
    }
    assert operations == {"text_completion", "chat", "embeddings", "retrieval"}
    assert (sums["vllm:num_requests_running"], sums["vllm:num_requests_waiting"]) == (0, 0)


def test_gauges_while_work_is_running_and_after_a_client_has_gone():
    gate = threading.Event()

    class Held(Parrot):
        def write(self, ids, options, cancelled):
            while not gate.wait(0.01):
                if cancelled():
                    return
            yield from super().write(ids, options, cancelled)

    watch = PrometheusObserver()
    gauges = lambda house: [
        read_metrics(scrape(house).text).get(f"vllm:num_requests_{n}", 0) for n in ("running", "waiting")
    ]
    with opened(Service(Held()), watch) as house:
        threads = [
            threading.Thread(target=house.web.post, args=("/v1/completions",), kwargs={"json": TEXT})
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert eventually(lambda: gauges(house) == [1, 2])
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{house.url}/v1/completions", json=TEXT, timeout=0.2, trust_env=False)
        assert eventually(lambda: gauges(house) == [1, 2])
        gate.set()
        for thread in threads:
            thread.join()
        assert eventually(lambda: gauges(house) == [0, 0])


def test_labels_are_few_whatever_is_asked():
    with opened(observer=PrometheusObserver(), requests_per_minute=10_000) as house:

        def series():
            return len(scrape(house).text.splitlines())

        house.web.post("/v1/completions", json=TEXT | {"model": "x"})
        house.web.get("/a/b")
        before = series()
        for i in range(30):
            house.web.post("/v1/completions", json=TEXT | {"model": f"model-{i}", "user": f"user-{i}"})
            house.web.get(f"/path/{i}")
        assert series() == before


def test_two_services_do_not_mix():
    one, two = PrometheusObserver(), PrometheusObserver()
    one.feedback("up")
    assert "llmbook_feedback_total" in read_metrics(one.render()[0].decode())
    assert "llmbook_feedback_total" not in read_metrics(two.render()[0].decode())


# ---- budgets ----


@pytest.mark.parametrize(
    "limits",
    [
        {"tokens_per_day": 24},
        {"euros_per_day": 0.024, "euros_per_million_prompt": 1000, "euros_per_million_completion": 1000},
    ],
)
def test_budget_stops_the_service(limits):
    watch = PrometheusObserver(Budget(BudgetSettings(**limits)))
    with opened(observer=watch, default_tokens=5) as house:
        answers = [house.web.post("/v1/completions", json=TEXT) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert (
            answers[-1].json()["error"]["type"] == "insufficient_quota"
            and int(answers[-1].headers["retry-after"]) > 0
        )
        sums = read_metrics(scrape(house).text)
    assert round(sums["llmbook_budget_used_ratio"], 3) == round(20 / 24, 3)
    assert sums["vllm:request_success_total"] == 2 and sums["vllm:num_requests_waiting"] == 0


def test_energy_budget_stops_the_service():
    watch = PrometheusObserver(Budget(BudgetSettings(joules_per_day=0.001)))
    with opened(observer=watch) as house:
        statuses = [house.web.post("/v1/completions", json=TEXT).status_code for _ in range(8)]
    assert statuses[0] == 200 and statuses[-1] == 429


def test_budget_of_one_unit_gives_back_the_others():
    budget = Budget(BudgetSettings(tokens_per_day=100, euros_per_day=0.0, euros_per_million_completion=5))
    with pytest.raises(Refusal, match="euros"):
        budget.reserve(Ticket(prompt_tokens=5, max_tokens=5))
    assert budget.ledger.spent("tokens") == 0


def test_budget_survives_a_restart_and_ends_at_midnight(tmp_path):
    now = [1000.0]
    make = lambda: Budget(BudgetSettings(tokens_per_day=100), tmp_path / "budget.json", clock=lambda: now[0])
    ticket = Ticket(prompt_tokens=5, max_tokens=60, started=0.0, completion_tokens=50)
    make().reserve(ticket)(0.0)
    assert make().ledger.spent("tokens") == 55
    with pytest.raises(Refusal):
        make().reserve(ticket)
    now[0] += 86400
    assert make().ledger.spent("tokens") == 0


def test_budget_settings_are_checked():
    with pytest.raises(SettingsError):
        BudgetSettings(tokens_per_day=-1)


# ---- quantiles ----


@given(st.lists(st.floats(0.001, 50), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_quantile_lies_in_the_bucket_of_the_true_one(values, share):
    edges = (0.01, 0.1, 0.5, 1.0, 5.0, 10.0)
    counts = {edge: sum(v <= edge for v in values) for edge in (*edges, float("inf"))}
    true = numpy.quantile(values, share, method="inverted_cdf")
    low = max((edge for edge in (0.0, *edges) if edge < true), default=0.0)
    high = min((edge for edge in edges if edge >= true), default=edges[-1])
    assert low - 1e-9 <= estimate_quantile(counts, share) <= high + 1e-9


def test_quantile_of_nothing():
    assert numpy.isnan(estimate_quantile({}, 0.5)) and numpy.isnan(estimate_quantile({1.0: 0, float("inf"): 0}, 0.5))


# ---- shipped files ----


def test_shipped_files_are_what_the_chapter_writes(tmp_path):
    for path in write_monitoring_files(tmp_path):
        shipped = ROOT / "deploy" / path.relative_to(tmp_path)
        assert shipped.read_bytes() == path.read_bytes(), (
            f"run write_monitoring_files('deploy'): {shipped.name} is stale"
        )


def test_every_name_in_rules_and_panels_exists():
    page = PrometheusObserver(Budget(BudgetSettings(tokens_per_day=1))).render()[0].decode()
    check_rules({rule.name: rule.expression for rule in RULES}, page)
    check_rules({f"{t} {legend}": q for t, _, lines in PANELS for legend, q in lines.items()}, page)
    with pytest.raises(InputError, match="reads vllm:queue"):
        check_rules({"x": "vllm:queue > 1"}, page)
    shipped = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"][0]["rules"]
    check_rules({rule["alert"]: rule["expr"] for rule in shipped}, page)
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len(PANELS)


def test_find_metrics():
    assert find_metrics('sum by (le) (rate(a:b_bucket{x="c"}[5m])) / 2.5e9 > 0.5 and max(d) == 0') == {
        "a:b_bucket",
        "d",
    }


promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool here (Debian: apt-get install prometheus)"
)


def run_promtool(*arguments, folder):
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)


@promtool
def test_faults_fire_and_a_quiet_hour_does_not():
    folder = ROOT / "deploy" / "prometheus"
    for arguments in (
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ):
        done = run_promtool(*arguments, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
@pytest.mark.parametrize("change", [("> 0.8", "> 5"), ("> 0.8", "> 0.05")])
def test_a_wrong_threshold_is_found(tmp_path, change):
    rules = [replace(rule, expression=rule.expression.replace(*change)) for rule in RULES]
    write_alert_rules(tmp_path / "rules.yml", rules)
    write_rule_tests(tmp_path / "rules_test.yml")
    assert run_promtool("test", "rules", "rules_test.yml", folder=tmp_path).returncode != 0


@promtool
def test_metrics_page_passes_promtool():
    page, _ = PrometheusObserver().render()
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    problems = [line for line in done.stderr.decode().splitlines() if "vllm:" not in line and "created" not in line]
    assert problems == []


# ---- an engine behind the service ----


def test_engine_tells_its_own_figures_without_counting_twice():
    from sample_models import build_decoder, build_tokenizer

    from llmbook.protocol import DecoderWriter

    tokenizer = build_tokenizer()
    writer = DecoderWriter(build_decoder(len(tokenizer)), tokenizer)
    watch, service = PrometheusObserver(), Service(writer, look_up, embed, count=len)
    prompt = "Return the sum of a list of numbers, return the sum of a list of numbers, and return it."
    for round in (1, 2):  # the second service goes on with the same engine and the same observer
        with opened(service, watch) as house:
            before = read_metrics(scrape(house).text)
            statuses = [house.web.post("/v1/completions", json=TEXT | {"prompt": prompt, "max_tokens": 5}).status_code
                        for _ in range(3)]
            house.web.post("/v1/embeddings", json={"model": "llmbook-encoder", "input": "abba"})
            page = scrape(house).text
        assert statuses == [200] * 3 and (round == 1 or before["vllm:generation_tokens_total"] == 15)
        figures, sums = writer.statistics(), read_metrics(page)
        assert figures["generation_tokens_total"] == 15 * round
        assert sums["vllm:generation_tokens_total"] == 15 * round
        assert sums["vllm:prompt_tokens_total"] == figures["prompt_tokens_total"] + 4 * round  # the encoder has no engine
        assert sums["vllm:prefix_cache_queries_total"] == figures["prefix_cache_queries"]
        assert sums["vllm:prefix_cache_hits_total"] == figures["prefix_cache_hits"] > 0
        assert sums["vllm:num_preemptions_total"] == 0 == sums["vllm:kv_cache_usage_perc"]
        assert sums["vllm:num_requests_running"] == 0 == sums["vllm:num_requests_waiting"]


def test_who_waits_before_the_engine_and_in_it_adds_up():
    now = {"num_requests_running": 2, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.75, "generation_tokens_total": 9}
    watch = PrometheusObserver()
    watch.watch("m", lambda: now)
    for started in (True, True, True, False):
        ticket = Ticket(model="m", prompt_tokens=4)
        watch.request_started(ticket)
        if started:
            ticket.started = ticket.arrived
            watch.work_started(ticket)
    read = lambda: {name: value for name, value in read_metrics(watch.render()[0].decode()).items() if "vllm:" in name}
    sums = read()
    assert (sums["vllm:num_requests_running"], sums["vllm:num_requests_waiting"]) == (2, 1 + 1)
    assert (sums["vllm:kv_cache_usage_perc"], sums["vllm:generation_tokens_total"]) == (0.75, 9)
    now = {"num_requests_running": 1, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.5, "generation_tokens_total": 12}
    assert read() | {"vllm:num_requests_running": 1, "vllm:num_requests_waiting": 1} == read()
    assert (read()["vllm:kv_cache_usage_perc"], read()["vllm:generation_tokens_total"]) == (0.5, 12)
