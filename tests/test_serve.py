"""The server, with the official client: each conversation gets what it gets alone, whatever the others do."""

import copy
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

httpx = pytest.importorskip("httpx", reason="pip install -r examples/serve/requirements.txt")
openai = pytest.importorskip("openai", reason="pip install -r tests/requirements.txt")
uvicorn = pytest.importorskip("uvicorn", reason="pip install -r examples/serve/requirements.txt")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from examples.serve.__main__ import main as serve_from_the_command_line  # noqa: E402
from examples.serve.app import Server, create_app  # noqa: E402
from examples.serve.conversations import Conversations, Held, home  # noqa: E402
from examples.serve.engine import Turn  # noqa: E402
from examples.serve.protocol import StopStrings  # noqa: E402

from .families import VOCAB  # noqa: E402
from .test_pool import Alone  # noqa: E402

N_SINK, WINDOW, PIECE, ROWS, CONTEXT = 4, 28, 16, 3, 64
SIZES = {
    "n_sink": N_SINK, "window": WINDOW, "prefill_chunk_size": PIECE, "max_streams": ROWS, "max_queue": 12, "max_idle": 40,
    "max_new_tokens": 9,
}  # fmt: skip
EOS = 2


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Random, with a context that conversations soon exceed, and answers that sometimes end by themselves."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, pad_token_id=None, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.weight[EOS] *= 1.5
        model.lm_head.weight[0] = 0  # a token without a text: what is said could not be told from the messages
    return model


@pytest.fixture(scope="module")
def talker(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same, but its answers never end by themselves."""
    talker = copy.deepcopy(model)
    with torch.no_grad():
        talker.lm_head.weight[EOS] = 0
    return talker


class Client:
    """What talks with a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def ask(self, messages: list[dict[str, str]], stream: bool = False, **options: Any) -> Any:
        return self.client().chat.completions.create(
            model="tiny", messages=messages, stream=stream, **{"temperature": 0, **options}
        )

    def streamed(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, str, Any]:
        """The text, why it ended, and the usage."""
        text, reason, usage = "", "", None
        for chunk in self.ask(messages, stream=True, stream_options={"include_usage": True}, **options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        return text, reason, usage

    def whole(self, messages: list[dict[str, str]], **options: Any) -> tuple[str, str, Any]:
        answer = self.ask(messages, **options)
        return answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage

    def metrics(self) -> dict[tuple[str, str], float]:
        """By their names and the values of their labels."""
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                found[sample.name.removeprefix("sink_cache_"), "".join(sample.labels.values())] = sample.value
        return found

    def streams(self) -> dict[str, int]:
        return {label: int(n) for (name, label), n in self.metrics().items() if name == "streams"}


@contextmanager
def serving(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Iterator[Client]:
    """A server in a thread, as long as the block lasts."""
    app = create_app(model, tokenizer, "tiny", **{**SIZES, **options})
    server = Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield Client(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def server(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Client]:
    with serving(model, tokenizer) as server:
        yield server


def user(*numbers: int) -> dict[str, str]:
    return {"role": "user", "content": " ".join(f"w{number}" for number in numbers)}


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


class Expected:
    """One conversation alone, without a server: what it gives, turn by turn."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.alone = Alone(model, N_SINK, WINDOW, PIECE)
        self.messages: list[dict[str, str]] = []

    def turn(self, message: dict[str, str], max_tokens: int) -> tuple[str, str]:
        self.messages.append(message)
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        seen = self.alone.text
        new = ids[len(seen) :]
        assert ids[: len(seen)] == seen
        answer = self.alone.turn(new, max_new_tokens=max_tokens, eos_token_id=EOS)
        said = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": said})
        return said, "stop" if answer[-1] == EOS else "length"


# --- answers ---


def test_many_at_once_get_what_they_get_alone(
    server: Client, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # More conversations than rows, streamed and whole, longer than the cache and than the model's context.
    turns, clients = 8, 9

    def said(number: int, turn: int) -> dict[str, str]:
        return user(*(20 + (7 * number + 3 * turn + i) % 100 for i in range(1 + (5 * number + turn) % 11)))

    def max_tokens(number: int, turn: int) -> int:
        return 5 + (number + turn) % 9

    def talk(number: int) -> list[tuple[str, str, Any]]:
        messages, found = [], []
        for turn in range(turns):
            messages.append(said(number, turn))
            ask = server.streamed if (number + turn) % 2 else server.whole
            found.append(ask(messages, max_tokens=max_tokens(number, turn)))
            messages.append({"role": "assistant", "content": found[-1][0]})
        return found

    with ThreadPoolExecutor(clients) as threads:
        found = list(threads.map(talk, range(clients)))
    reasons, lengths = set(), []
    for number in range(clients):
        expected, known = Expected(model, tokenizer), 0
        for turn in range(turns):
            text, reason, usage = found[number][turn]
            assert (text, reason) == expected.turn(said(number, turn), max_tokens(number, turn))
            assert usage.prompt_tokens_details.cached_tokens == known  # all but the news
            known = usage.total_tokens
            assert known == len(expected.alone.text)
            reasons.add(reason)
        lengths.append(known)
    assert reasons == {"stop", "length"}
    assert max(lengths) > 2 * CONTEXT
    assert server.streams() == {"active": 0, "queued": 0, "idle": clients, "parked": clients - ROWS}


def test_texts_that_are_known_edited_and_new(server: Client, model: LlamaForCausalLM) -> None:
    # What the model is given tells what was read again: texts are read by themselves, and steps have all rows.
    read: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        read.append(ids.shape[1] if len(ids) == 1 else 0)

    def tokens_read(*messages: dict[str, str]) -> int:
        """Asks, adds the answer to `texts`, and compares the usage with what was read."""
        read.clear()
        text, _, usage = server.whole(list(messages), max_tokens=6)
        texts.append({"role": "assistant", "content": text})
        known = usage.prompt_tokens_details.cached_tokens
        assert sum(read) == usage.prompt_tokens - known + (known > 0)  # and the token that was generated last
        return sum(read)

    texts: list[dict[str, str]] = []
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    system, first = {"role": "system", "content": "w90 w91"}, user(*range(30, 50))
    assert tokens_read(system, first) == 32
    short = [system, first, texts[0]]
    assert tokens_read(*short, user(60)) <= 10
    long = [*short, user(60), texts[1]]
    assert tokens_read(*short, user(61)) > 38  # the conversation went on otherwise, and is held with that
    assert tokens_read(*long, user(62)) <= 10
    long += [user(62), texts[3]]
    another_answer = {"role": "assistant", "content": texts[0]["content"] + " w9"}
    for edited in (
        [{"role": "system", "content": "w90 w92"}, *long[1:]],
        [system, first, another_answer, *long[3:]],
        [user(1), *long],
        long[1:],
    ):
        assert tokens_read(*edited, user(63)) > 50
    assert tokens_read(*long, user(63)) <= 10
    hook.remove()


def test_dropped_conversations_are_read_again(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(model, tokenizer, max_idle=2) as server:
        messages = [user(*range(20, 100))]  # longer than the model's context
        messages += [{"role": "assistant", "content": server.whole(messages)[0]}, user(60)]
        for number in (1, 2):
            server.whole([user(number)])
        assert server.streams()["idle"] == 2
        text, reason, usage = server.whole(messages, max_tokens=6)
        assert usage.prompt_tokens_details.cached_tokens == 0
        assert usage.prompt_tokens > CONTEXT
    expected = Expected(model, tokenizer)
    expected.messages = messages[:-1]
    assert (text, reason) == expected.turn(messages[-1], 6)


def test_seeds(server: Client) -> None:
    def ask(seed: int | None, **options: Any) -> str:
        text: str = server.whole([user(30, 31)], temperature=1.5, max_tokens=12, seed=seed, **options)[0]
        return text

    assert ask(1) == ask(1) != ask(2)
    assert ask(None) != ask(None)
    assert ask(1, top_p=1e-6) == ask(2, top_p=1e-6) == server.whole([user(30, 31)], max_tokens=12)[0]


def test_stop_strings(talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(talker, tokenizer) as server:
        messages = [user(33, 34, 35)]
        words = server.whole(messages, max_tokens=9)[0].split()
        stop = f"{words[4]} {words[5]}"
        for ask in (server.whole, server.streamed):
            text, reason, _ = ask(messages, max_tokens=9, stop=["no such word", stop])
            assert (text.split(), reason) == (words[:4], "stop")
        # Its stream has more than the answer, so that nothing may go on from it.
        _, _, usage = server.whole([*messages, {"role": "assistant", "content": text}, user(36)])
        assert usage.prompt_tokens_details.cached_tokens == 0
        assert server.streams()["idle"] == 2


@pytest.mark.parametrize(
    "stops, pieces, text, found",
    [
        ([], ["ab", "c"], "abc", False),
        (["bc"], ["ab", "cd"], "a", True),
        (["bcx"], ["ab", "cd"], "abcd", False),
        (["c", "bcd"], ["ab", "cd"], "a", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["ab"], ["xa"], "xa", False),
    ],
)
def test_stop_strings_across_pieces(stops: list[str], pieces: list[str], text: str, found: bool) -> None:
    finder = StopStrings(stops)
    assert "".join(finder.take(piece) for piece in pieces) + finder.rest == text
    assert finder.found == found


# --- clients that go, and too many of them ---


ENDLESS = {"max_tokens": 10**6}


def test_clients_that_go_free_their_rows(talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # Streamed, whole, and waiting in the queue: all leave, but for one whose answer is as ever.
    with serving(talker, tokenizer) as server, ThreadPoolExecutor(1) as threads:
        stays = threads.submit(server.streamed, [user(30, 31)], max_tokens=600)
        until(lambda: server.streams()["active"] == 1)
        leaving = [server.ask([user(40 + n)], stream=True, **ENDLESS) for n in range(ROWS - 1)]
        for stream in leaving:
            assert [next(stream).choices[0].delta.content for _ in range(3)]
        queued = server.ask([user(50)], stream=True, **ENDLESS)
        until(lambda: server.streams()["queued"] == 1)
        queued.close()
        leaving.pop().close()
        until(lambda: server.streams()["active"] == 2)
        body = {"model": "tiny", "messages": [user(60)], **ENDLESS}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
        until(lambda: server.streams()["active"] == 2)
        leaving.pop().close()
        assert not stays.done()
        text, reason, _ = stays.result()
        until(lambda: server.streams() == {"active": 0, "queued": 0, "idle": 1, "parked": 0})
    assert (text, reason) == Expected(talker, tokenizer).turn(user(30, 31), 600)


def test_a_full_queue_refuses(talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(talker, tokenizer, max_streams=1, max_queue=1) as server:
        running, queued = (server.ask([user(30 + n)], stream=True, **ENDLESS) for n in range(2))
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="all 2 places are taken"):
                server.ask([user(40)], stream=stream)
        running.close()
        while not next(queued).choices[0].delta.content:
            pass
        queued.close()
        until(lambda: server.streams() == {"active": 0, "queued": 0, "idle": 0, "parked": 0})
        assert server.whole([user(40)])[1] == "length"


# --- what is refused, and what fails ---


@pytest.fixture(scope="module")
def shared(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Client]:
    """For requests that leave nothing behind."""
    with serving(model, tokenizer) as server:
        yield server


@pytest.mark.parametrize(
    "body, status, param, says",
    [
        ({"model": "large"}, 404, "model", "no model 'large' here, but 'tiny'"),
        ({"model": None}, 400, "model", "valid string"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "w9"}]}, 400, "messages.0.role", "'assistant'"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0", "needs content"),
        ({"messages": [{"role": "user", "content": "w9", "name": "x"}]}, 400, "messages.0", "with name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages.0", "with tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages.0.content",
            "",
        ),
        ({"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": "many"}, 400, "max_completion_tokens", "valid integer"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop", "at most 4"),
        ({"stop": [""]}, 400, "stop", "none of them empty"),
        ({"seed": 2**64}, 400, "seed", "less than"),
        ({"n": 2}, 400, None, "n=2 is not supported"),
        ({"logprobs": True}, 400, None, "logprobs=true"),
        ({"tools": [{"type": "function"}]}, 400, None, "tools="),
        ({"response_format": {"type": "json_object"}}, 400, None, "response_format="),
        ({"nonsense": 1}, 400, None, "nonsense=1"),
    ],
)
def test_bad_requests(shared: Client, body: dict[str, Any], status: int, param: str | None, says: str) -> None:
    request = {"model": "tiny", "messages": [user(9)], **body}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", json=request)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert (error["param"] or "").startswith(param or "")
    assert says in error["message"]
    assert sum(shared.streams().values()) == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}']
)
def test_bodies_that_are_none(shared: Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{shared.url}/v1/chat/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_paths(shared: Client) -> None:
    client = shared.client()
    assert [card.id for card in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="no model 'other/large'"):
        client.models.retrieve("other/large")
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="tiny", input="w9")
    assert httpx.get(f"{shared.url}/health").json() == {"status": "ok"}


def test_what_asks_for_nothing_is_taken(shared: Client) -> None:
    # Among it the answer of the client's own type, with all of its empty fields.
    parts = [{"type": "text", "text": "w30 "}, {"type": "text", "text": "w31"}]
    first = shared.client().chat.completions.create(
        model="tiny", messages=[{"role": "developer", "content": "w90"}, {"role": "user", "content": parts}], n=1,
        tools=[], user="somebody", logit_bias={}, response_format={"type": "text"}, max_completion_tokens=4, temperature=0,
    )  # fmt: skip
    answer = first.choices[0].message.model_dump()
    again = [{"role": "system", "content": "w90"}, user(30, 31), answer, user(32)]
    usage = shared.ask(again).usage
    assert usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_messages_that_the_template_refuses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, shared: Client
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        + tokenizer.chat_template
    )
    with serving(model, strict) as server:
        with pytest.raises(openai.BadRequestError, match="no system prompts"):
            server.ask([{"role": "system", "content": "w9"}])
        assert server.whole([user(9)])[0] == shared.whole([user(9)])[0]


@pytest.mark.parametrize(
    "content",
    [
        "{{ message['content'] if loop.last }}",  # as those that leave out what a model thought before
        "{{ message['content'] }} w9",  # something between what was said and the token that ends it
    ],
)
def test_templates_that_make_another_text_of_an_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, content: str
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", content)
    with serving(model, other) as server:
        answers = ((user(n), server.whole([user(n)])) for n in range(30, 70))
        asked, text = next((asked, text) for asked, (text, reason, _) in answers if reason == "stop")
        _, _, usage = server.whole([asked, {"role": "assistant", "content": text}, user(32)])
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_keys(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(model, tokenizer, api_key="secret") as server:
        for key in ("wrong", "secre", "sécret"):
            answer = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            server.ask([user(9)])
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/metrics").status_code == 200
        assert server.client("secret").models.list().data[0].id == "tiny"


def test_a_text_that_fails_harms_no_other(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if 99 in ids[0, 1:]:
            raise MemoryError("no room")

    with serving(talker, tokenizer) as server, ThreadPoolExecutor(1) as threads:
        hook = talker.register_forward_pre_hook(fail, with_kwargs=True)
        stays = threads.submit(server.whole, [user(30, 31)], max_tokens=60)
        with pytest.raises(openai.InternalServerError, match="broken off: no room"):
            server.ask([user(99)])
        with pytest.raises(openai.APIError, match="broken off: no room"):
            list(server.ask([user(99)], stream=True))
        assert stays.result()[0] == Expected(talker, tokenizer).turn(user(30, 31), 60)[0]
        hook.remove()
        assert server.streams() == {"active": 0, "queued": 0, "idle": 1, "parked": 0}


def test_a_step_that_fails_ends_all(talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with serving(talker, tokenizer) as server:
        stream = server.ask([user(30)], stream=True, **ENDLESS)
        until(lambda: server.streams()["active"] == 1)
        hook = talker.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(openai.APIError, match="division by zero"):
            list(stream)
        hook.remove()
        with pytest.raises(openai.InternalServerError, match="the engine has stopped: division by zero"):
            server.ask([user(30)])
        assert httpx.get(f"{server.url}/health").status_code == 503


# --- from the command line ---


@pytest.fixture(scope="module")
def folder(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    talker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_interrupt_ends_it_cleanly(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.serve", "--model", str(folder), "--port", str(port), "--window", "28"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def answers() -> bool:
            assert process.poll() is None
            try:
                return bool(client.models.list().data[0].id == "tiny")
            except openai.APIConnectionError:
                return False

        until(answers, seconds=60)
        stream = client.chat.completions.create(model="tiny", messages=[user(30)], stream=True, **ENDLESS)
        next(stream)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGINT)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "options",
    [["--model", "no/such-model"], ["--device", "cuda:99"]],
    ids=lambda options: options[0],
)
def test_a_mistake_is_answered_in_one_line(folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["serve", "--model", str(folder), *options])
    with pytest.raises(SystemExit, match=r"\Aerror: .+\Z"):
        serve_from_the_command_line()


def test_no_conversation_is_held_if_none_may_be() -> None:
    held = Held(Turn(), b"", 1, 1, None)
    assert Conversations(0).hold(held) == [held]


def test_a_model_without_a_chat_template(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        create_app(model, plain, "tiny", **SIZES)


# --- replicas ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::DeprecationWarning:pydantic")
def test_two_replicas(folder: Path, talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'ray[serve]'")
    from ray import serve

    from examples.serve.replicas import application

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"model": str(folder), "name": "tiny", "device": "cpu", "dtype": "float32", **SIZES}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(2, options))
        replicas = Client(f"http://127.0.0.1:{port}")
        talks = [[user(30 + n)] for n in range(6)]
        for turn in range(3):
            with ThreadPoolExecutor(6) as threads:
                ask = replicas.streamed if turn % 2 else replicas.whole
                found = list(threads.map(lambda messages, ask=ask: ask(messages, max_tokens=6), talks))
            for messages, (text, _, usage) in zip(talks, found, strict=True):
                assert (usage.prompt_tokens_details.cached_tokens > 0) == (turn > 0)
                messages += [{"role": "assistant", "content": text}, user(60 + turn)]
        for messages in talks:
            expected = Expected(talker, tokenizer)
            for asked, answer in zip(messages[:-1:2], messages[1::2], strict=True):
                assert answer["content"] == expected.turn(asked, 6)[0]
        held = [replicas.metrics()["streams", f"{number}idle"] for number in range(2)]
        assert min(held) > 0
        assert sum(held) == 6
        # Who goes frees the row, and errors come through.
        stream = replicas.ask([user(99)], stream=True, **ENDLESS)
        until(lambda: sum(replicas.metrics()["streams", f"{number}active"] for number in range(2)) == 1)
        stream.close()
        until(lambda: sum(replicas.metrics()["streams", f"{number}active"] for number in range(2)) == 0)
        with pytest.raises(openai.BadRequestError, match="n=2 is not supported"):
            replicas.ask([user(9)], n=2)
        assert httpx.get(f"{replicas.url}/health").json() == {"replicas": [200, 200]}
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [1]}'])
def test_bodies_without_a_home(body: bytes) -> None:
    assert home(body, 5) == 0


def test_a_conversation_stays_at_home() -> None:
    homes = set()
    for number in range(40):
        messages = [{"role": "system", "content": "w9"}, user(number)]
        at = home(json.dumps({"messages": messages}).encode(), 5)
        messages += [{"role": "assistant", "content": "w8"}, user(7)]
        assert at == home(json.dumps({"messages": messages, "stream": True}).encode(), 5)
        homes.add(at)
    assert homes == set(range(5))
