import pytest

from retune.evaluation.metrics import evaluate
from retune.evaluation.report import decision_markdown
from retune.records import CheckResult, Decision, Gate, Measured

GATES = [
    Gate("same_test_rows", True, "Both releases were measured on the same 4 test rows by the same code.").to_json(),
    Gate("gain", False, "Measurably worse: 0.5 against 1.", -0.5, 0.0, -0.9, -0.1, on_fail="REJECT").to_json(),
]


@pytest.fixture
def evaluations(make_frame, make_prompt):
    channel = ["web", "web", "a|b <i>", "a|b <i>"]
    sides = {"candidate": [0, 0, 1, 2], "champion": [0, 1, 2, 2], "baseline": [1, 0, 0, 0], "few_shot": [0, 1, 0, 2]}
    target = [0, 1, 2, 2]
    return {role: evaluate(make_frame(target, said, channel=channel), make_prompt(), role[0] * 64, "e") for role, said in sides.items()}


def test_verdict_and_reasons_stand_on_top(evaluations, make_prompt):
    decision = Decision("REJECT", ["Measurably worse.", "Barred."], GATES, None)
    lines = decision_markdown(decision, evaluations, make_prompt()).splitlines()
    assert lines[:4] == ["# ticket_priority: REJECT", "", "- Measurably worse.", "- Barred."]


def test_tables_hold_the_figures_of_every_role_in_order(evaluations, make_prompt):
    prompt = make_prompt(promote={"metric": "accuracy", "max_slice_gap": 0.1, "min_slice_rows": 2})
    report = decision_markdown(Decision("REJECT", ["Worse."], GATES, None), evaluations, prompt)
    assert "| metric | template alone | few-shot | champion | candidate | better | unit |" in report
    assert "| **accuracy** | 0.0000 | 0.7500 | 1.0000 | 0.5000 | higher | share of rows, 0 to 1 |" in report
    releases = "template alone `bbbbbbbbbbbb`, few-shot `ffffffffffff`, champion `cccccccccccc`, candidate `cccccccccccc`"
    assert f"On 4 test rows: {releases}." in report
    assert "| gain | **failed: REJECT** | -0.5000 | -0.9000 to -0.1000 | 0.0000 | Measurably worse: 0.5 against 1. |" in report
    assert "| same_test_rows | passed |  |  |  | Both releases" in report
    # F1 of high by hand: champion 1; candidate and few-shot 2*1/(1+2); the template alone never says high.
    assert "| high | 2 | 0.0000 | 0.6667 | 1.0000 | 0.6667 |" in report
    assert "| channel=web | 2 | 0.0000 | 1.0000 | 1.0000 | 0.5000 | -0.5000 | yes |" in report


def test_labelled_sets_and_probes_have_a_table_of_their_own(evaluations, make_frame, make_prompt):
    changed = make_frame([0, 1], [0, 0], channel=["web"] * 2).assign(set="typos", of=["row-0", "row-1"])
    candidate = evaluate(make_frame([0, 1], [0, 1], channel=["web"] * 2), make_prompt(), "r" * 64, "e", changed)
    prompt = make_prompt(promote={"metric": "accuracy"})
    report = decision_markdown(Decision("HOLD", [], GATES, None), {**evaluations, "candidate": candidate}, prompt)
    assert "## accuracy on changed rows, and the share of outputs that changed" in report
    assert "| typos | 2 | missing | missing | missing | 0.5000 | missing | missing | missing | 0.5000 |  |" in report


def test_text_from_data_cannot_break_out_of_its_cell(evaluations, make_prompt):
    report = decision_markdown(Decision("HOLD", ["slice [x](http://evil) |\n# big"], GATES, None), evaluations, make_prompt())
    assert "- slice \\[x\\](http://evil) \\| # big" in report
    assert "channel=a\\|b &lt;i>" in report


def test_a_generation_prompt_without_champion_or_slices_is_reported(make_prompt, make_texts):
    prompt = make_prompt(task="generation", labels={}, slices=[], promote={"metric": "exact_match"})
    frame = make_texts(["a", "c"], [["a", "d"], ["b"]])
    report = decision_markdown(Decision("HOLD", [], [], None), {"candidate": evaluate(frame, prompt, "r" * 64, "e")}, prompt)
    assert "- No reason was recorded." in report
    assert "| **exact_match** | 0.5000 | higher | share of rows, 0 to 1 |" in report
    assert "| output_words | 1.0000 |  | mean words of a row's output |" in report
    assert "sacreBLEU: bleu `nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:" in report
    assert "by slice" not in report
    assert "by label" not in report


def test_checks_and_what_was_measured_are_told_where_there_are_any(evaluations, make_prompt):
    decision = Decision("HOLD", ["Not better."], GATES, None)
    checks = [
        CheckResult("an outage | is high", True, False, "Expected 'high'; got 'low'."),
        CheckResult("capitals", False, False, "Expected 'low'; got 'high'."),
        CheckResult("calm", True, True, "Expected 'low'; got 'low'."),
    ]
    measured = {
        "candidate": Measured(8.25, 12.5, 3456.7, 2560, float("nan"), None),
        "champion": Measured(8.0, 11.0, 3500.2, 0, 1.5, 0.0021),
    }
    report = decision_markdown(decision, evaluations, make_prompt(), measured, checks)
    assert "| an outage \\| is high | **failed** | yes | Expected 'high'; got 'low'. |" in report
    assert "| capitals | failed, reported only | no | Expected 'low'; got 'high'. |" in report
    assert "| calm | passed | yes | Expected 'low'; got 'low'. |" in report
    assert "|  | champion | candidate | unit |" in report
    assert "| latency, 95th percentile | 11.0 | 12.5 | milliseconds of one prediction |" in report
    assert "| throughput | 3,500.2 | 3,456.7 | tokens per second, read and written |" in report
    assert "| tuning | 1.5 | not known | seconds |" in report
    assert "| cost of tuning | 0.0021 | no price set | at RETUNE_DEVICE_HOUR_PRICE |" in report
    plain = decision_markdown(decision, evaluations, make_prompt())
    assert "## Checks" not in plain
    assert "## Latency and cost" not in plain
