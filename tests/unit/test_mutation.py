"""The result of mutation testing: what counts as noticed, and which judgements stay."""

from __future__ import annotations

from scripts.mutation import changed, judgements, summary

DIFF = """--- serverless_llm/a.py
+++ serverless_llm/a.py
@@ -1,3 +1,3 @@
 def f(x):
-    return x + 1
+    return x - 1
"""
LESS = ["- return x + 1", "+ return x - 1"]


def test_a_change_is_the_lines_that_differ() -> None:
    assert changed(DIFF) == LESS


def test_what_nobody_noticed_survived_whatever_mutmut_calls_it() -> None:
    ends = ["killed", "killed", "timeout", "segfault", "survived", "no tests", "suspicious", "not checked"]
    found = {"a.py": [(f"a.x_f__mutmut_{number}", end, LESS) for number, end in enumerate(ends)], "empty.py": []}
    result = summary(found, {})
    assert result["total"] == {"mutants": 8, "run": 7, "killed": 2, "timeout": 2, "survived": 3, "score": 0.5714}
    assert list(result["modules"]) == ["a.py"]
    assert [one["end"] for one in result["modules"]["a.py"]["survivors"]] == ["survived", "no tests", "suspicious"]


def test_a_judgement_stays_with_its_change_and_leaves_with_it() -> None:
    first = summary({"a.py": [("a.x_f__mutmut_1", "survived", LESS)]}, {})
    first["modules"]["a.py"]["survivors"][0]["judgement"] = "equivalent: x is never read"
    more, elsewhere = ["- return x + 1", "+ return x + 2"], ("a.x_g__mutmut_1", "survived", LESS)
    found = {"a.py": [("a.x_f__mutmut_4", "survived", LESS), ("a.x_f__mutmut_5", "survived", more), elsewhere]}
    second = summary(found, judgements(first))
    judged = [one["judgement"] for one in second["modules"]["a.py"]["survivors"]]
    assert judged == ["equivalent: x is never read", "", ""]
