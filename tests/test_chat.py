"""The chat example, with a tiny model whose words are its tokens; what all examples do with errors and Ctrl-C."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from examples import chat as chat_example
from examples import endless as endless_example
from examples import generate as generate_example
from examples.chat import Chat, main
from examples.command_line import noting_ctrl_c, run

from .families import tiny_model
from .oracle import streamed_logits


def test_a_chat_is_one_text_whose_system_prompt_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    # A turn that is fed twice or not at all, a last token that is lost between turns, an answer that was cut off and not closed.
    model: PreTrainedModel = tiny_model("llama")
    fed: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append((args[0] if args else kwargs["input_ids"]).clone()), with_kwargs=True
    )
    chat = Chat(model, tokenizer, "w20 w21 w22", window=16)
    assert chat.cache.n_sink == 7
    odd, end = [0, 1, *range(3, 9)], 1.2  # answers of words alone, some of which end by themselves
    system, said = {"role": "system", "content": "w20 w21 w22"}, []
    for i in range(8):
        message = " ".join(f"w{30 + (5 * i + j) % 60}" for j in range((1, 25, 3)[i % 3]))
        answer = chat.answer(
            message, 9, do_sample=False, suppress_tokens=odd, sequence_bias={(2,): end}, pad_token_id=0
        )
        said += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    hook.remove()
    lengths = [len(turn["content"].split()) for turn in said[1::2]]
    assert min(lengths) < max(lengths) == 9
    assert chat.cache.get_seq_length() == sum(part.shape[1] for part in fed) > 3 * chat.cache.capacity
    text = torch.cat([*fed, chat.unread], dim=1)
    assert tokenizer.decode(text[0]).split() == tokenizer.apply_chat_template([system, *said], tokenize=False).split()

    logits = streamed_logits(model, text, 7, 16)[0]
    logits[:, odd] = -torch.inf
    logits[:, 2] += end
    best, tokens = logits.argmax(-1).tolist(), text[0].tolist()
    begins = [t + 2 for t in range(len(tokens) - 1) if tokens[t : t + 2] == [1, 6]]
    for begin, length in zip(begins, lengths, strict=True):
        assert tokens[begin : begin + length] == best[begin - 1 : begin - 1 + length]


def test_the_script_is_answered_on_stdout(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "script.txt").write_text("w40 w41\nw50\n")
    options = ["--model", str(tmp_path / "model"), "--script", str(tmp_path / "script.txt"), "--window", "8"]
    monkeypatch.setattr(
        sys, "argv", ["chat", *options, "--system", "w20", "--max-new-tokens", "5", "--temperature", "0"]
    )
    main()
    out = capsys.readouterr().out
    assert "> w40 w41\n" in out
    assert out.count(" tokens seen, ") == 2
    assert " tokens seen, 13 held, in " in out


class PressesCtrlC(BaseStreamer):
    """The user, who presses Ctrl-C after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after + 1  # generate() puts the prompt first

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def end(self) -> None: ...


@pytest.mark.parametrize("words", [2, 30])  # before anything was evicted, and after
def test_ctrl_c_ends_an_answer_and_the_talk_goes_on(tokenizer: PreTrainedTokenizerFast, words: int) -> None:
    # An interrupt in the middle of a step would leave the cache with some layers one token ahead, and the talk would be lost.
    model: PreTrainedModel = tiny_model("llama")
    message = " ".join(f"w{20 + i}" for i in range(words))
    options = {"do_sample": False, "suppress_tokens": [0, 1, 2], "pad_token_id": 0}
    said, lengths = [], []
    for interrupted in (True, False):
        chat = Chat(model, tokenizer, "w20 w21 w22", window=16)
        if interrupted:
            with noting_ctrl_c() as ctrl_c:
                first = chat.answer(message, 9, streamer=PressesCtrlC(4), stopping_criteria=[ctrl_c], **options)
        else:
            first = chat.answer(message, 4, **options)
        said.append((first, chat.answer("w50 w51", 9, **options)))
        lengths.append(chat.cache.get_seq_length())
    assert said[0] == said[1]
    assert lengths[0] == lengths[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("example", [generate_example.main, endless_example.main])
def test_ctrl_c_ends_an_example_with_what_there_is(
    example: Callable[[], None],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path)
    for module, name in ((generate_example, "Progress"), (endless_example, "TextStreamer")):
        monkeypatch.setattr(module, name, pressing_ctrl_c(getattr(module, name)))
    monkeypatch.setattr(sys, "argv", ["example", "--model", str(tmp_path), "--prompt", "w20", "--max-new-tokens", "99"])
    example()
    out = capsys.readouterr().out
    assert (
        "--- SinkWindowCache" in out if example is generate_example.main else "[7 tokens, the last at position" in out
    )
    assert "DynamicCache" not in out


def pressing_ctrl_c(streamer: type) -> type:
    """The streamer of an example, at whose seventh token the user presses Ctrl-C."""

    class Pressing(streamer):  # type: ignore[misc]
        user = PressesCtrlC(7)

        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            self.user.put(value)

    return Pressing


@pytest.mark.parametrize(
    "options, says",
    [
        (["--model", "no/such-model"], "error: cannot load no/such-model: "),
        (["--device", "cuda:99"], "cuda:99 cannot be used"),
        (["--window", "-3"], "must be at least 1, but is -3"),
        (["--max-new-tokens", "0"], "must be at least 1, but is 0"),
        (["--script", "/no/such/file"], "there is no file /no/such/file"),
        (["--script", sys.executable], "is not a text in UTF-8"),
        (["--temperature", "-1"], "must be a number of at least 0, but is -1"),
        (["--temperature", "nan"], "must be a number of at least 0, but is nan"),
        (["--prompt", ""], "must not be empty"),
    ],
)
@pytest.mark.parametrize("example", [chat_example.main, endless_example.main, generate_example.main])
def test_a_mistake_is_answered_in_one_line(
    example: Callable[[], None],
    options: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if options[0] in ("--script", "--temperature") and example is not chat_example.main:
        pytest.skip("an option of chat alone")
    if options[0] == "--prompt" and example is chat_example.main:
        pytest.skip("chat has messages instead")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["example", *options])
    with pytest.raises(SystemExit) as exit:
        example()
    error = str(exit.value.code) if isinstance(exit.value.code, str) else capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert "error: " in last
    assert says in last


def test_an_empty_folder_is_answered_in_a_whole_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tokenizer's own message begins with a line that ends in a colon.
    monkeypatch.setattr(sys, "argv", ["example", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"\Aerror: cannot load .*\.\Z"):
        generate_example.main()


def test_ctrl_c_while_the_model_is_loaded_is_answered_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_example, "load", load)
    monkeypatch.setattr(sys, "argv", ["example"])
    with pytest.raises(SystemExit) as exit:
        run(generate_example.main)
    assert exit.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_model_that_is_refused_is_answered_in_one_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path)
    tiny_model("gpt2").save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"\Aerror: SinkWindowCache does not support model type 'gpt2'.*\Z"):
        generate_example.main()
