"""Tasks that lm-eval does not define, or not so that they run without the hub, in its own configuration form."""

from __future__ import annotations

from typing import Any

from rarefy.evaluation.tasks.sandbox import passes

_MEAN = {"aggregation": "mean", "higher_is_better": True}


def _passed(record: dict[str, Any], results: list[str]) -> dict[str, float]:
    program = f"{record['prompt']}{results[0]}\n\n{record['test']}\ncheck({record['entry_point']})\n"
    return {"pass_at_1": float(passes(program))}


# Tasks that run what a model wrote.
RUNS_CODE = frozenset({"humaneval_greedy"})

OWN: dict[str, dict[str, Any]] = {
    # The questions of BoolQ without the passages that answer them: what a model knows, at a base rate of 62% yes.
    "boolq_closed_book": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc", **_MEAN}],
    },
    # MMLU as one task: the prompt that lm-eval gives each of its 57 subjects, for rows that name their subject.
    "mmlu_flat": {
        "output_type": "multiple_choice",
        "doc_to_text": (
            "The following are multiple choice questions (with answers) about {{subject|replace('_', ' ')}}.\n\n"
            "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
        ),
        "doc_to_target": "answer",
        "doc_to_choice": ["A", "B", "C", "D"],
        "metric_list": [{"metric": "acc", **_MEAN}],
    },
    # HumanEval, one greedy answer for each problem, run in our own sandbox.
    "humaneval_greedy": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{test}}",
        "process_results": _passed,
        "metric_list": [{"metric": "pass_at_1", **_MEAN}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": 512, "do_sample": False,
        },
        "num_fewshot": 0,
    },
}  # fmt: skip
for _name, _config in OWN.items():
    _config.update(task=_name, metadata={"version": 1.0})
