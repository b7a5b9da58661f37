import math
from collections import Counter

from rlad.tasks.base import Verdict, cannot_judge, judged, split_of, text_key


def test_splits_are_80_10_10():
    counts = Counter(split_of(str(key)) for key in range(20_000))
    # Standard deviation of a 10 % share of 20000: 42.
    assert abs(counts["validation"] - 2000) < 210
    assert abs(counts["test"] - 2000) < 210
    assert sum(counts.values()) == 20_000


def test_split_of_a_key_never_changes():
    # The first 16 hex digits of `printf i | sha256sum`, modulo 10000: i 770, n 1757, l 2000, a
    # 2250.
    assert [split_of(key) for key in "inla"] == ["validation", "test", "train", "train"]


def test_text_key_ignores_case_space_and_compatibility_forms():
    assert text_key("What is\n 1 + 1 ?") == text_key("  what IS 1 + 1 ? ")
    assert text_key("x² ½") == text_key("x2 1⁄2")
    assert text_key("1 + 1") != text_key("1 + 2")
    assert len(text_key("\ud800")) == 16


def test_verdicts_and_their_rewards():
    assert (judged(True).verdict, judged(True).reward) == (Verdict.CORRECT, 1.0)
    assert (judged(False).verdict, judged(False).reward) == (Verdict.WRONG, 0.0)
    unknown = cannot_judge("timed out")
    assert (
        unknown.verdict == Verdict.CANNOT_JUDGE
        and math.isnan(unknown.reward)
        and unknown.reason == "timed out"
    )
