"""The decision's page: what a browser gets, read back from the bytes. How it looks is tested in tests/integration/test_report_page.py."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import decisions
import numpy as np
import pytest

from retune.evaluation.charts import reliability
from retune.evaluation.metrics import evaluate
from retune.evaluation.page import Report, decision_page
from retune.records import Decision

HOSTILE = '</script><img src=x onerror="alert(1)"><b>{{ 7 * 7 }}'


class Seen(HTMLParser):
    """Headings, rows of tables, text, and every attribute that a browser would act on."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.links: dict[str, str] = {}
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag not in ("tr", "table"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data.replace("\n", "")

    def row(self, name: str) -> list[str]:
        (found,) = [row for row in self.rows if row and row[0].split(" ")[0] == name]
        return found

    @property
    def headings(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("h2", "id")]


@pytest.fixture(scope="module")
def report() -> Report:
    return decisions.classification()


@pytest.fixture(scope="module")
def seen(report: Report) -> Seen:
    return Seen(decision_page(report))


def test_the_verdict_and_its_reasons_come_first(report: Report, seen: Seen) -> None:
    assert report.decision.verdict == "REJECT"
    places = [
        seen.text.index(text)
        for text in ("ticket_priority: REJECT", f"1 of {len(report.decision.gates)} gates failed", *report.decision.reasons, "Every gate")
    ]
    assert places == sorted(places)
    assert seen.headings[:2] == ["gates", "metrics"]


def test_every_section_that_has_something_to_show_is_there_in_order(seen: Seen) -> None:
    order = ["gates", "metrics", "parts", "flips", "sample", "confusion", "reliability", "curves", "cost", "checks", "lineage"]
    assert seen.headings == order
    assert [value for tag, name, value in seen.attributes if (tag, name) == ("a", "href")][: len(order)] == [f"#{id}" for id in order]


def test_parts_that_are_absent_leave_no_section() -> None:
    whole = decisions.classification(rows=120)
    prompt = whole.prompt.model_copy(update={"slices": {}})
    bare = {role: evaluate(frame, prompt, whole.evaluations[role].release, "7" * 64) for role, frame in whole.predictions.items()}
    bare = {role: replace(evaluation, per_class={}) for role, evaluation in bare.items()}
    page = decision_page(replace(whole, prompt=prompt, evaluations=bare, curves={}, measured={}, checks=None))
    assert Seen(page).headings == ["gates", "metrics", "flips", "sample", "confusion", "reliability", "lineage"]
    assert "template alone" not in Seen(page).text


def test_a_generation_has_no_confusions_and_its_worst_falls_first() -> None:
    report = decisions.generation()
    seen = Seen(decision_page(report))
    assert not {"confusion", "reliability"} & set(seen.headings)
    kinds = [row[1] for row in seen.rows if len(row) == 6 and row[1].startswith("ROUGE-L")]
    falls = [float(after) - float(before) for before, after in (re.findall(r"[\d.]+\d", kind) for kind in kinds)]
    assert len(falls) == 10
    assert all(fall < 0 for fall in falls)
    assert all(one <= other for one, other in pairwise(falls))
    assert f"sacreBLEU's signature of bleu: {report.evaluations['candidate'].signatures['bleu']}" in seen.text


def test_the_figures_are_those_of_the_records(report: Report, seen: Seen) -> None:
    roles = ("baseline", "champion", "candidate")
    for metric in ("accuracy", "macro_f1", "log_loss"):
        assert seen.row(metric)[1:4] == [f"{report.evaluations[role].metrics[metric]:.4f}" for role in roles]
    assert seen.row("channel=email")[2:5] == [f"{report.evaluations[role].slices['channel']['email']['macro_f1']:.4f}" for role in roles]
    assert seen.row("typos")[5:8] == [f"{report.evaluations[role].sets['typos']['changed']:.4f}" for role in roles]
    comparison = report.decision.comparison
    assert comparison is not None
    assert f"{comparison['gain']:+.4f}, from {comparison['low']:+.4f} to {comparison['high']:+.4f}" in seen.text
    share = 100 * comparison["won"] / (comparison["won"] + comparison["lost"])
    assert f"the candidate has {share:.1f} % right, from {100 * comparison['won_low']:.1f} to" in seen.text
    assert f"McNemar's exact test: p = {comparison['mcnemar']:.2g}" in seen.text
    for gate in report.decision.gates:
        outcome = "✓ passed" if gate["passed"] else f"✕ failed: {gate['on_fail']}"
        value, threshold = ("" if gate[key] is None else f"{gate[key]:.4f}" for key in ("value", "threshold"))
        row = next(row for row in seen.rows if row[0] == gate["name"])  # the gates' table comes first
        assert (row[1], row[2], row[4], row[5]) == (outcome, value, threshold, gate["reason"])
    assert ["latency, 95th percentile", "35.0", "37.5", "milliseconds of one prediction"] in seen.rows
    assert [row[:2] for row in seen.rows if row[0] in ("urgent stays urgent", "greets politely")] == [
        ["urgent stays urgent", "✕ failed"],
        ["greets politely", "✓ passed"],
    ]


def test_flips_are_counted_and_listed_negative_ones_first(report: Report, seen: Seen) -> None:
    ours, theirs = (report.predictions[role] for role in ("candidate", "champion"))
    negative = ours["id"][(theirs["prediction"] == theirs["target"]) & (ours["prediction"] != ours["target"])]
    positive = ours["id"][(theirs["prediction"] != theirs["target"]) & (ours["prediction"] == ours["target"])]
    listed = [(row[0], row[1]) for row in seen.rows if len(row) == 6 and row[1] in ("right to wrong", "wrong to right")]
    assert sorted(row for row, kind in listed if kind == "right to wrong") == sorted(negative)
    assert {row for row, kind in listed if kind == "wrong to right"} <= set(positive)
    assert [kind for _, kind in listed] == ["right to wrong"] * len(negative) + ["wrong to right"] * 10
    assert f"{len(negative)}negative: right with the champion" in seen.text
    assert f"{len(positive)}positive: wrong with the champion" in seen.text
    text = report.test.set_index("id").loc[listed[0][0], "text"]
    assert text in seen.text


def test_the_sample_shows_what_was_drawn_and_keeps_whose_is_whose_for_the_end(report: Report, seen: Seen) -> None:
    shown = [value for tag, name, value in seen.attributes if (tag, name) == ("li", "data-id")]
    assert shown == [row for row, _ in report.sample.rows]
    assert len(shown) == 20
    key = {row[0]: row[1] for row in seen.rows if len(row) == 3 and row[1] in ("candidate", "champion")}
    assert key == dict(report.sample.rows)
    assert set(key.values()) == {"candidate", "champion"}
    page = decision_page(report)
    rated = page[page.index('id="ratings"') : page.index('id="save"')]
    assert not re.search(r"\b(candidate|champion)\b", rated)


def test_text_from_data_and_people_stays_text(report: Report) -> None:
    label = "high<i>"
    prompt = report.prompt.model_copy(update={"description": HOSTILE, "labels": {"low": " a", "medium": " b", label: " c"}})
    frames = {
        role: frame.assign(
            channel=HOSTILE,
            target=frame["target"].replace("high", label),
            prediction=frame["prediction"].replace("high", HOSTILE),
        ).rename(columns={"p_high": f"p_{label}"})
        for role, frame in report.predictions.items()
    }
    evaluations = {role: evaluate(frame, prompt, decisions.RELEASES[role], "7" * 64) for role, frame in frames.items()}
    hostile = replace(
        report,
        prompt=prompt,
        predictions=frames,
        evaluations=evaluations,
        test=report.test.assign(text=HOSTILE),
        decision=replace(report.decision, reasons=[HOSTILE]),
        trigger=replace(report.trigger, by=HOSTILE, reason=HOSTILE, url="javascript:alert(1)"),
        sample=replace(report.sample, prompt=HOSTILE),
        curves={HOSTILE: report.curves["1: as in the prompt file"]},
        checks=[replace((report.checks or [])[0], name=HOSTILE, reason=HOSTILE)],
    )
    page = decision_page(hostile)
    seen = Seen(page)
    assert "img" not in seen.tags
    assert seen.tags.count("script") == 2, "its own two"
    assert HOSTILE in seen.text, "shown as it is"
    assert "49" not in re.findall(r"<b>(\d+)", page)
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert not [value for _, name, value in seen.attributes if name == "href" and not value.startswith("#")]


def test_nothing_is_loaded_from_elsewhere_and_only_the_pages_own_script_may_run(seen: Seen, report: Report) -> None:
    page = decision_page(report)
    loading = [(tag, name, value) for tag, name, value in seen.attributes if name in ("src", "srcset", "data", "action", "xlink:href")]
    assert loading == []
    assert "link" not in seen.tags
    assert not re.search(r"url\(|@import", page)
    (policy,) = [value for tag, name, value in seen.attributes if (tag, name) == ("meta", "content") and "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_the_same_decision_gives_the_same_bytes(report: Report) -> None:
    assert decision_page(report) == decision_page(decisions.classification())


def test_frames_that_do_not_fit_are_said_to_and_the_rest_is_shown(report: Report) -> None:
    """Such a candidate is held or rejected, and somebody has to read why."""
    champion = report.predictions["champion"].iloc[::-1]
    candidate = report.predictions["candidate"].assign(p_low=np.nan)
    refused = Decision("REJECT", ["The candidate's figures are not complete."], report.decision.gates, None)
    seen = Seen(decision_page(replace(report, decision=refused, predictions={"candidate": candidate, "champion": champion})))
    assert seen.text.count("Not shown: both releases must be evaluated on the same test rows") == 2
    assert "The two could not be compared; the gates say why." in seen.text
    assert "Reliability of the champion" in seen.text
    assert "Reliability of the candidate" not in seen.text, "no row has probabilities"


def test_many_labels_are_listed_by_confusion() -> None:
    names = [f"intent_{number}" for number in range(30)]
    prompt = decisions.prompt_of("classification", labels={name: f" {name}" for name in names}, target="label", slices=[])
    test = decisions.texts(90)
    target = np.arange(90) % 30
    frames = {}
    for role, wrong in (("candidate", {0, 30}), ("champion", {0, 30, 60, 5})):
        said = [names[(code + 1) % 30] if row in wrong else names[code] for row, code in enumerate(target)]
        shares = {f"p_{name}": np.where(np.array(said) == name, 0.71, 0.01) for name in names}
        frames[role] = test[["id", "group"]].assign(target=[names[code] for code in target], prediction=said, **shares)
    seen = Seen(decision_page(decisions.report_of(prompt, frames, test)))
    assert [row for row in seen.rows if row[0] == "intent_0" and row[1] == "intent_1"] == [
        ["intent_0", "intent_1", "3"],
        ["intent_0", "intent_1", "2"],
    ]


def test_reliability_bins_by_hand(make_frame, labels) -> None:
    """The fixture is 0.8 sure of a label, and 0.4 of one outside of the labels, which counts as wrong."""
    frame = make_frame([0, 0, 0, 1, 2], [0, 0, 1, 1, -1])
    filled = {round(each.low, 1): (each.rows, each.accuracy) for each in reliability(frame, labels) if each.rows}
    assert filled == {0.8: (4, 0.75), 0.4: (1, 0.0)}
    frame.loc[0, "p_low"] = np.nan
    assert sum(each.rows for each in reliability(frame, labels)) == 4, "a row without probabilities is in no bin"
