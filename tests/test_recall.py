"""`benchmarks.recall`: what is asked is what was read, and what is recalled is what a cache still holds, to the token.

Reference paths: a model built by hand that can copy and nothing else, so that its recall is 1 where it sees the first occurrence
and 0 where it does not; and the oracle, which shares no code with the library. Our path: the harness.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from benchmarks import asking, harness, models, recall
from sink_cache import SinkWindowCache

from .oracle import streamed_logits

VOCAB, CODE, TRAINED = 1000, 64, 256
CHOOSING = Path(__file__).parents[1] / "docs" / "choosing.md"


@torch.no_grad()
def copying_model(trained: int = TRAINED) -> SmolLM3ForCausalLM:
    """Return a model that can copy: its first layer fetches the token before, its second finds what followed the current token.

    Tokens are random signs, `CODE` numbers each. The residual stream holds the signs of the current token, of the token before,
    and of the predicted token, and a constant. The first layer has rotary embeddings, the second one none.
    """
    sizes = {"hidden_size": 4 * CODE, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": CODE}
    more = {
        "no_rope_layers": [1, 0],
        "max_position_embeddings": trained,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    rope = {"rope_type": "default", "rope_theta": 100.0}
    model = SmolLM3ForCausalLM(SmolLM3Config(**sizes, **heads, **more, rope_parameters=rope)).eval()
    for weight in (one for name, one in model.named_parameters() if "norm" not in name):
        weight.zero_()
    code = torch.randn(VOCAB, CODE, generator=torch.Generator().manual_seed(0)).sign()
    current, before, predicted = (slice(n * CODE, (n + 1) * CODE) for n in range(3))
    constant, eye, turn = 3 * CODE, torch.eye(CODE), 100.0 ** (-torch.arange(CODE // 2) / (CODE // 2))
    model.model.embed_tokens.weight[:, current], model.model.embed_tokens.weight[:, constant] = code, 1.0
    model.lm_head.weight[:, predicted] = 0.3 * code
    first, second = (layer.self_attn for layer in model.model.layers)
    # Scores are sums of cos(turn * (distance - 1)): largest for the token before.
    first.k_proj.weight[: CODE // 2, constant] = 10.0
    first.q_proj.weight[:, constant] = 10.0 * torch.cat([turn.cos(), -turn.sin()])
    first.v_proj.weight[:, current], first.o_proj.weight[before] = eye, eye
    second.q_proj.weight[:, current], second.k_proj.weight[:, before] = 5 * eye, eye
    second.v_proj.weight[:, current], second.o_proj.weight[predicted] = eye, eye
    return model


@pytest.fixture(scope="module")
def copying() -> models.LoadedModel:
    return models.LoadedModel(copying_model(), None, "copying")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    all_special_ids = ()

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 256


@pytest.fixture(scope="module")
def guessing() -> models.LoadedModel:
    """A model with random weights, in which what is attended to matters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=TRAINED, initializer_range=0.3)
    return models.LoadedModel(LlamaForCausalLM(config).eval(), Bytes(), "guessing")


def rows_of(loaded: models.LoadedModel, *argv: str) -> list[dict[str, Any]]:
    return list(recall.rows_of(loaded, recall.parse(["--num-samples", "3", *argv])))


def by_asked(rows: list[dict[str, Any]], method: str, what: str = "accuracy") -> dict[int, Any]:
    return {row["asked"]: row[what] for row in rows if row["method"] == method}


@pytest.mark.parametrize("chunk_size", ["1", "7", "64"])
def test_recall_ends_with_the_window_to_the_token(copying: models.LoadedModel, chunk_size: str) -> None:
    sizes = ("--n-sink", "2", "--capacities", "18", "--segment", "5", "--max-tokens", "200", "--chunk-size", chunk_size)
    rows = rows_of(copying, *sizes, "--distances", "8", "16", "17", "18", "19", "60", "--pairs", "1")
    recall.warn(rows)  # of nothing: the dense cache can do it
    assert by_asked(rows, "dense") == dict.fromkeys([8, 16, 17, 18, 19, 60], 1.0)
    assert by_asked(rows, "sink") == {8: 1, 16: 1, 17: 0, 18: 0, 19: 0, 60: 0}  # a window of 16
    assert by_asked(rows, "window") == {8: 1, 16: 1, 17: 1, 18: 1, 19: 0, 60: 0}  # of 18
    # Distance 17 is left out: there the first of the 18 tokens is asked for, which has no token before it.
    assert by_asked(rows, "recompute") | {17: None} == {8: 1, 16: 1, 17: None, 18: 0, 19: 0, 60: 0}
    for row in rows:
        assert row["distance_tokens"] == row["asked"]
        assert row["questions"] == 3 * 4
        if row["accuracy"] in (0, 1):
            assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        else:  # of three texts
            assert row["accuracy_low"] is row["accuracy_high"] is None
        assert (row["nats_saved"] > 5) == bool(row["accuracy"])
        assert row["same_accuracy"] == pytest.approx(row["accuracy"], abs=1e-3)  # recompute is asked all
        assert row["warning"] == row["reason"] == ""


def test_what_is_pinned_is_recalled_at_any_distance(copying: models.LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    sizes = ("--n-sink", "24", "--capacities", "40", "--segment", "6", "--text-file", str(tmp_path / "a.txt"))
    rows = rows_of(copying, "--task", "pinned", *sizes, "--further", "50", "400")
    assert by_asked(rows, "sink") == {50: 1, 400: 1}
    assert by_asked(rows, "window") == {50: 0, 400: 0}
    assert by_asked(rows, "dense") == {50: 1, 400: None}
    assert f"trained context of {TRAINED}" in by_asked(rows, "dense", "reason")[400]
    argv = ["--task", "pinned", "--num-samples", "2", *sizes, "--further", "50", "400"]
    samples, questions = recall.pinned_texts(copying, recall.parse(argv), np.random.default_rng(0))
    again = [(one.asked, one.again - 1) for one in questions if one.sample == 0]
    assert again == [(50, 74), (50, 80), (400, 424), (400, 430)]  # tokens from the start of the 24 sinks
    for one in questions:
        first, second = (samples[one.sample][at - 1 : at + 5] for at in (one.first, one.again))
        assert torch.equal(first, second)


def test_a_dense_cache_is_asked_within_the_trained_context(copying: models.LoadedModel) -> None:
    sizes = ("--n-sink", "2", "--capacities", "18", "--segment", "5", "--max-tokens", "400", "--distances", "8")
    dense, sink = rows_of(copying, *sizes, "--pairs", "12", "--arms", "dense", "sink")
    assert dense["accuracy"] == sink["accuracy"] == 1
    assert 0.4 < dense["questions"] / sink["questions"] < 0.8  # 256 of 400 tokens


def test_numbers_are_those_of_the_oracle(guessing: models.LoadedModel) -> None:
    argv = ("--num-samples", "2", "--n-sink", "2", "--capacities", "10", "--segment", "4", "--max-tokens", "40")
    args = recall.parse([*argv, "--distances", "6", "20", "--pairs", "1"])
    samples, questions = recall.copy_texts(guessing, args, np.random.default_rng(0))
    rows = [row for row in recall.measure(guessing, args, (samples, questions)) if row["method"] == "sink"]
    ids = torch.stack(samples)
    logits = streamed_logits(guessing.model, ids[:, :-1], 2, 8)
    nll = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    right = logits.argmax(-1) == ids[:, 1:]
    for row in rows:
        asked = [one for one in questions if one.asked == row["asked"]]
        pairs = [((q.sample, q.first - 1 + i), (q.sample, q.again - 1 + i)) for q in asked for i in range(3)]
        assert len(pairs) == 2 * 3
        assert all(ids[:, 1:][a] == ids[:, 1:][b] for a, b in pairs)
        assert row["nats_saved"] == pytest.approx(np.mean([(nll[a] - nll[b]).item() for a, b in pairs]), abs=1e-4)
        assert row["accuracy"] == pytest.approx(np.mean([right[b].item() for _, b in pairs]))


def test_streameval_asks_for_the_line_so_many_lines_back() -> None:
    loaded = models.LoadedModel(copying_model(trained=3000), Bytes(), "bytes")
    argv = ("--task", "streameval", "--num-samples", "2", "--max-tokens", "3000", "--line-distances", "10", "20")
    args = recall.parse([*argv, "--n-sink", "2", "--capacities", "64", "--arms", "dense", "sink"])
    samples, questions = recall.streameval_texts(loaded, args, np.random.default_rng(0))
    texts = [bytes(ids.tolist()).decode() for ids in samples]
    assert {one.asked for one in questions} == {10, 20}
    # Each line is asked about once: the answer in an earlier question would be nearer than the line.
    assert len({(one.sample, one.first) for one in questions}) == len(questions) > 5
    for one in questions:
        line, said = texts[one.sample][: one.again].splitlines()[-2:]
        assert one.tokens == 5
        about = (last := int(line.split()[4])) - one.asked
        assert last % 10 == 0
        assert said == f"What is the REGISTER_CONTENT in line {about}? The REGISTER_CONTENT in line {about} is <"
        answer = texts[one.sample][one.again :][:6]
        assert texts[one.sample][: one.first + 6].endswith(f"The REGISTER_CONTENT in line {about} is <{answer}")
    rows = list(recall.measure(loaded, args, (samples, questions)))
    recall.warn(rows)
    assert all("cannot do the task" in row["warning"] for row in rows)
    assert sum(row["questions"] for row in rows if row["method"] == "sink") == len(questions)


def test_what_recompute_is_not_asked_is_left_out_of_the_same_accuracy(
    copying: models.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers of sink; and of recompute, which is asked the first and the fourth question.
    rights = iter([[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(recall, "answered", lambda *_, **__: {"right": next(rights)})
    sizes = ("--n-sink", "2", "--capacities", "18", "--segment", "5", "--max-tokens", "100", "--distances", "8")
    rows = rows_of(copying, *sizes, "--pairs", "2", "--recompute-questions", "2", "--arms", "sink", "recompute")
    assert [row["same_accuracy"] for row in rows] == [1.0, 1.0]


def test_an_answer_of_several_tokens_is_right_as_a_whole() -> None:
    correct = np.zeros((1, 39), bool)
    correct[0, 30:33] = True  # the last three of the four from token 30 on
    scores = {"arm": [{"samples": [0], "nll": np.zeros((1, 39)), "correct": correct}]}
    run, question = SimpleNamespace(scored=np.ones((1, 39), bool), scores=scores), recall.Question(0, 10, 30, 4, 20)
    assert recall.answered(run, "arm", [question], whole=False)["accuracy"] == 0.75
    assert recall.answered(run, "arm", [question], whole=True)["accuracy"] == 0.0
    assert recall.answered(run, "arm", [question] * 6, whole=False)["accuracy_low"] is None  # all of one text


def test_intervals_are_of_texts() -> None:
    # Three equal answers in each text give the same interval as one answer in each text.
    rng = np.random.default_rng(1)
    alone = rng.random(40)
    assert asking.interval(np.repeat(alone, 3), np.repeat(range(40), 3)) == asking.interval(alone, range(40))
    low, high = asking.interval(alone, range(40))
    half = 1.96 * alone.std() / 40**0.5
    assert [low, high] == pytest.approx([alone.mean() - half, alone.mean() + half], abs=0.1 * half)
    assert asking.interval(alone[:8], [0, 0, 1, 1, 2, 2, 3, 3]) == (None, None)
    assert asking.interval([0.0] * 96, range(96)) == pytest.approx((0, 1.96**2 / (96 + 1.96**2)), abs=1e-4)  # Wilson's


@pytest.mark.parametrize("capacity", [64, 12])
def test_the_likeliest_choice_is_that_of_the_oracle(guessing: models.LoadedModel, capacity: int) -> None:
    cache, seen = SinkWindowCache(2, capacity - 2), torch.tensor([], dtype=torch.long)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        prompt, *choices = (torch.from_numpy(rng.integers(256, size=n)) for n in (5, 1, 3, 2))
        means = []
        for choice in choices:
            ids = torch.cat([seen, prompt, choice])[None]
            logits = streamed_logits(guessing.model, ids[:, :-1], 2, capacity - 2)[0, -len(choice) :]
            means.append(logits.log_softmax(-1).gather(-1, choice[:, None]).mean().item())
        chosen = asking.choose_answer(guessing.model, cache, prompt, choices)
        assert chosen == int(np.argmax(means))
        seen = torch.cat([seen, prompt, choices[chosen]])
        assert cache.get_seq_length() == len(seen)


def test_questions_one_after_the_other(
    guessing: models.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "test.jsonl").open("w") as lines:
        for n in range(12):
            choices = {"text": [f"{n}", f"{n + 9} {n + 3}", "none"], "label": ["A", "B", "C"]}
            lines.write(json.dumps({"question": f"{n}?", "choices": choices, "answerKey": "ABC"[n % 3]}) + "\n")
    sizes = ("--num-samples", "11", "--n-sink", "2", "--capacities", "12", "1000")
    rows = rows_of(guessing, "--task", "choices", "--dataset", str(tmp_path), *sizes)
    assert [row["method"] for row in rows] == ["dense", "sink", "sink", "window", "window", asking.ALONE]
    dense, small, large, _, without_sinks, alone = rows
    assert large["accuracy"] == without_sinks["accuracy"]  # of caches that evict nothing
    by_hand = []
    for n in range(11):
        prompt, *choices = (
            torch.tensor(list(text.encode()))
            for text in (f"Question: {n}?\nAnswer:", f" {n}", f" {n + 9} {n + 3}", " none")
        )
        by_hand.append(asking.choose_answer(guessing.model, DynamicCache(), prompt, choices) == n % 3)
    assert alone["right"] == by_hand
    assert 0 < sum(by_hand) < 11
    fits = dense["questions"]
    assert f"after {fits} questions the trained context of {TRAINED}" in dense["warning"]
    assert 8 <= fits < alone["questions"] == small["questions"] == 11
    # Arms that have answered more questions say so, and compare on those that the dense cache has answered.
    for row in rows:
        assert row["same_accuracy"] == pytest.approx(np.mean(row["right"][:fits]))
        assert row is dense or row["warning"].startswith(f"dense has answered {fits} of these questions")
    assert dense["same_accuracy"] == large["same_accuracy"] == dense["accuracy"]
    monkeypatch.setattr(guessing.model.config, "max_position_embeddings", 5)
    first, *others = rows_of(guessing, "--task", "choices", "--dataset", str(tmp_path), *sizes)
    assert "after 0 questions" in first["reason"]
    assert {row["questions"] for row in others} == {11}
    assert {row["same_accuracy"] for row in others} == {None}


def test_the_recipe_for_many_questions_answers_as_if_the_text_were_read_anew(guessing: models.LoadedModel) -> None:
    draw = torch.Generator().manual_seed(0)
    text, *questions = (torch.randint(256, (1, n), generator=draw) for n in (40, 5, 9))
    (block,) = (part.partition("```")[0] for part in CHOOSING.read_text().split("```python\n")[1:])
    block = block.replace("1020", "12").replace("=200)", "=8, do_sample=False)\n    answers.append(answer)")
    ids = iter(questions)  # which the tokenizer gives, one for each question of the page
    given = {
        "inputs": SimpleNamespace(input_ids=text),
        "tokenizer": lambda *_, **__: SimpleNamespace(input_ids=next(ids)),
    }
    exec(block, {"model": guessing.model, "answers": (answers := []), **given})
    for question, answer in zip(questions, answers, strict=True):
        logits = streamed_logits(guessing.model, answer[:, :-1], n_sink=40, window=12)
        assert answer.shape[1] == 40 + question.shape[1] + 8
        assert logits[0, -8:].argmax(-1).tolist() == answer[0, -8:].tolist()


@pytest.mark.parametrize("task", ["copy", "questions"])
def test_the_command_line(task: str, tmp_path: Path) -> None:
    options = {
        "copy": ["--segment", "3", "--distances", "5", "20", "--max-tokens", "60", "--num-samples", "1"],
        "questions": ["--offline", "--num-samples", "3", "--text-tokens", "300", "--question-tokens", "4"],
    }
    sizes = ["--n-sink", "2", "--capacities", "12", "--device", "cpu", "--output", str(tmp_path)]
    assert harness.run(recall.main, ["--task", task, "--random-weights", "llama-tiny", *sizes, *options[task]]) == 0
    (path,) = tmp_path.glob(f"recall-llama-tiny-random-weights-{task}-*.json")
    rows = harness.read_json(path)["rows"]
    for row in rows:
        assert (row["task"], row["reason"]) == (task, "")
        assert row["questions"] > 0
    if task == "questions":
        assert [row["same_first_tokens"] for row in rows] == [True] * 3
