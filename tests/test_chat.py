"""The chat example, with a tiny model whose words are its tokens."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from examples.chat import Chat, main

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
    assert "tokens; the cache held 13" in out
