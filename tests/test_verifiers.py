"Verifiers on hard cases, and on real solutions whose labels are known"
import json

import pytest

from post_training.core.files import UserError
from post_training.models.verifiers import exact_match, final_number, json_match, row_verifier, run_verifier

# what was written, the right answer, whether it is right
NUMBERS = [
    ("She has 12 apples.", "12", 1), ("12", "#### 12", 1), ("A: 12", "12", 1), ("#### 12", "A: 12", 1), ("13", "12", 0),
    ("She earns $1,234,567 in all", "1234567", 1), ("1'234 CHF", "1234", 1), ("1 234 567 people", "1234567", 1), ("1.234,50 EUR", "1234.5", 1),
    ("$18.00", "18", 1), ("18 dollars", "$18", 1), ("5 km/h", "5", 1), ("about 30°C", "30", 1), ("45%", "45", 1), ("It weighs 3 kg.", "3", 1),
    ("-5", "-5", 1), ("−5", "-5", 1), ("5", "-5", 0), ("10-5", "5", 1), ("x = -3.5", "-7/2", 1), ("it fell by 3 to -12 degrees", "-12", 1),
    ("3/4", "0.75", 1), ("1 1/2 cups", "1.5", 1), (r"\frac{3}{4}", "3/4", 1), ("2/0", "2", 0), ("0.3333333333", "1/3", 1), ("0.33", "1/3", 0),
    (r"thus $\boxed{42}$ and not 41", "42", 1), (r"\boxed{1{,}234}", "1234", 1), (r"\boxed{x = 7}", "7", 1), (r"\boxed{12\text{ cm}}", "12", 1),
    ("3 + 4 = 7, then 7 * 2 = 14", "14", 1), ("7 * 2 = <<7*2=14>>14 in all", "14", 1), ("the answer is 14, not 7", "14", 1),
    ("Answer: 14\nChecked twice: 2 ways", "14", 1), ("#### 5\nA: 6", "5", 1), ("2, 3 and 5", "5", 1), ("in 2 steps: 1. add 2. stop. 9", "9", 1),
    ("5kg", "5", 1), ("12cm²", "12", 1), ("10 mph", "10", 1), (r"\boxed{18 \text{ dollars}}", "18", 1), (r"\boxed{5^{\circ}}", "5", 1), ("$5k", "5000", 0),
    ("1\u202f234\u202f567", "1234567", 1), ("1.234.567", "1234567", 1), ("12,34,567", "1234567", 1), ("10,000.00", "10000", 1), (r"\boxed{10\,000}", "10000", 1),
    ("1,23", "1.23", 1),
    ("–5", "-5", 1), ("(-5)", "-5", 1), ("-$5", "-5", 1), ("$-5$", "-5", 1), ("-1,234.5", "-1234.5", 1), (r"\boxed{-5}", "-5", 1), ("minus 5", "-5", 0),
    ("3-4", "-4", 0), ("-0", "0", 1),
    (r"\frac12", "1/2", 1), (r"2\frac{1}{2}", "2.5", 1), (r"-\dfrac{3}{4}", "-0.75", 1), ("½", "0.5", 1), ("1½ cups", "1.5", 1), ("-2 1/2", "-2.5", 1),
    ("6/8", "3/4", 1), ("5/0", "5", 0),
    (r"\boxed{\frac{3}{4}}", "0.75", 1), ("between 3 and 5, so 4.", "4", 1), (r"\boxed{3} or \boxed{4}", "4", 1), ("The answer is 7 out of 10", "7", 1), ("7 (of 10)", "7", 0),
    ("**Answer:** 12", "12", 1), (r"\[ 42 \]", "42", 1), (r"\boxed{\$18}", "18", 1), (r"\boxed{18\%}", "18", 1), ("$$x = 42$$", "42", 1),
    (r"3 \times 10^4", "30000", 0), ("１２", "12", 1),
    ("N/A", "0", 0), ("   ", "0", 0), ("NaN", "0", 0), ("∞", "1", 0),
    ("The answer is 6 * 7 = 42", "42", 1), ("The answer is 6 * 7 = 42", "6", 0), ("#### 6 * 7 = 42", "42", 1), ("A: 3 - 5 = -2", "-2", 1), ("Answer: 42 = 6 * 7", "42", 1),
    ("The answer is 42. Check: 42 - 2 = 40", "42", 1), ("The answer is 7 (as 3 + 4 = 7)", "7", 1), (r"The answer is 6 \times 7 = 42 (100%)", "42", 1), ("The answer is 5, as x = 3", "5", 1),
    ("The answer is 1e9999999", "5", 0), ("5, so the answer is 1e00000000099999999", "5", 0), ("the answer is 1e-9999999", "0", 0), ("9" * 5000, "9", 0), ("1/" + "9" * 5000, "0", 0),
    ("5 or 1/0", "5", 0), ("1e003", "1000", 1),
    ("2e3", "2000", 1), (".5", "0.5", 1), ("12.", "12", 1), ("no number", "0", 0), ("", "0", 0), ("twelve", "12", 0), ("1,2,3", "3", 0),
]


@pytest.mark.parametrize("text, answer, right", NUMBERS)
def test_final_number(text, answer, right):
    assert final_number(text, answer) == right


def test_agrees_with_the_labels_of_real_solutions(data_dir):
    "Four models' solutions of 1,319 problems, each labelled right or wrong"
    n, wrong = 0, []
    for line in (data_dir / "gsm8k_model_solutions.jsonl").open():
        row = json.loads(line)
        for made in (v for v in row.values() if isinstance(v, dict)):
            n += 1
            if bool(final_number(made["solution"], row["ground_truth"])) != made["is_correct"]: wrong.append(made["solution"][-80:])
    assert n == 5276 and not wrong


def test_a_right_solution_is_right(data_dir):
    rows = [json.loads(line) for line in (data_dir / "gsm8k_test.jsonl").open()]
    assert all(row_verifier(r) == "final_number" and final_number(r["answer"], r["answer"]) for r in rows)


@pytest.mark.parametrize("name, answer, said", [
    ("final_number", None, "without an answer"), ("final_number", "none", "contains no number"), ("regex", "(", "not a regular expression"),
    ("json_match", "{", "not JSON"), ("length", "short", "MIN-MAX"), ("exactmatch", "x", "Did you mean 'exact_match'")])
def test_a_row_that_cannot_be_checked_is_an_error(name, answer, said):
    with pytest.raises(UserError, match=said): run_verifier(name, "1", answer)


def test_texts_and_calls():
    assert exact_match("n  r e b ", "n r e b") and not exact_match("n r e", "n r e b")
    assert json_match('[{"square": {"n":12}}]', '[{"square": {"n": 12}}]') and not json_match('[{"square": {"n": "12"}}]', '[{"square": {"n": 12}}]')


def test_a_pattern_that_takes_too_long_is_the_rows_fault(monkeypatch):
    "It is neither right nor wrong; patterns that Python's own engine never ends with are quick"
    from post_training.preferences.rewards import verifier_scorer
    from post_training.models import verifiers
    assert run_verifier("regex", "a" * 40 + "b", "(a+)+$") == 0.0
    with pytest.raises(UserError, match="without nested repetition"): verifiers.regex_match("a" * 60 + "b", "(a|aa)+$", seconds=.1)
    monkeypatch.setitem(verifiers.VERIFIERS, "regex", lambda text, answer: verifiers.regex_match(text, answer, seconds=.1))
    row = dict(id="slow", prompt=[], answer="(a|aa)+$", verifier="regex", completions=[dict(content="a" * 60 + "b")] * 50)
    [found] = verifier_scorer().score([row])
    assert found.reason == "regex cannot use the answer"


@pytest.mark.parametrize("text", ["\n" * 40000, "1/" + "1" * 20000 + "/", "1 " * 20000, "1,1." * 10000, r"\boxed{" * 2000, "the answer is " + "1 + " * 8000, "111 " * 10000])
def test_odd_long_texts_take_no_time(text):
    import time
    start = time.perf_counter()
    run_verifier("final_number", text, "5")
    assert time.perf_counter() - start < 60  # milliseconds; a pattern that goes back and forth would take hours
