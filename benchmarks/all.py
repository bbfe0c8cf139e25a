"""The set of results of one GPU, in parts that can be run one by one. Results that exist are not measured again."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import harness

SHORT = {
    "FAST": "--rounds 8 --steps 3 --min-seconds 0.1 --warm-up-seconds 0.05",
    "EAGER": "--no-compile --arms dense dense-at-capacity sink",
    "RUN": "--mode step --arms dense sink --offline --dtype bfloat16 --num-samples 2",
    "CALLS": "--arms static-at-capacity sink endless --rounds 5 --new-tokens 96 --profile",
    "LINES": "--num-samples 3 --max-tokens 4096 --line-distances 20 40 60 --arms dense sink",
    "BOOK": "--num-samples 1 --max-tokens 4096 --score-from 2048 --chunk-size 256",
    "QUANTIZED": "--arms endless --rounds 5 --new-tokens 96 --quantize",
    "LAPTOP": "--device cpu --arms dense endless --contexts 2000 --rounds 5 --new-tokens 48 --call-tokens 32 --quantize",
    "SMOL": "--model {smollm2}",
    "WIKI": "--model {smollm2} --text-file {wiki}",
    "STUDY": "--mode step --capacities 256 --arms dense sink",
    "MOBY": "--arms dense sink window --batch-size 1 --chunk-size 512",
    "SINKS": "--arms sink line-breaks --n-sinks 0 1 2 4 8 --num-samples 8 --max-tokens 6000 --score-from 2048 --chunk-size 256",
    "ALL": "--capacities 256 512 1024 2048 4096",
}
# Part, seconds on an H200, name of the result file, command. A whole run and the steps that predict it are neighbours.
# Part 6 is for a CPU, and runs only when it is asked for.
SET = """
1  85 steps-study-70m latency --random-weights pythia-70m EAGER FAST --contexts 256 512 1024 8192 ALL
1  90 run-70m ppl --random-weights pythia-70m RUN --max-tokens 768 --capacities 256
1  45 steps-short-410m latency --random-weights pythia-410m EAGER FAST --contexts 128 256 512 --capacities 128
1  85 run-410m ppl --random-weights pythia-410m RUN --max-tokens 384 --capacities 128
1 110 steps-short-6.9b latency --random-weights pythia-6.9b EAGER FAST --contexts 128 256 512 --capacities 128
1  70 run-6.9b ppl --random-weights pythia-6.9b RUN --num-samples 1 --max-tokens 384 --capacities 128
2 160 steps-6.9b latency --random-weights pythia-6.9b FAST --contexts 4096 8192 32768 --profile
2 230 steps-llama-3-8b latency --random-weights llama-3-8b FAST --contexts 4096 32768 --compile-static-at 4096 32768 --profile
2  75 paper-llama-2-7b latency --random-weights llama-2-7b FAST --no-compile --arms sink recompute --contexts 4096 ALL --profile
3  50 steps-410m latency --random-weights pythia-410m EAGER FAST --contexts 4096 8192 32768
3  50 steps-1.4b latency --random-weights pythia-1.4b EAGER FAST --contexts 4096 8192 32768
3 150 calls-410m calls steps --random-weights pythia-410m CALLS --contexts 4096
3 200 calls-llama-3-8b calls steps --random-weights llama-3-8b CALLS
3  60 rows-llama-3-8b throughput rows --random-weights llama-3-8b
4 105 quality ppl WIKI --num-samples 16 --max-tokens 6000 --score-from 2048 --batch-size 16 --chunk-size 256
4  30 moby-dick ppl --text-file {moby} SMOL --num-samples 1 --max-tokens 20000 --position-bin 2000 --capacities 1024 MOBY
4 110 throughput-llama-3-8b throughput steady --random-weights llama-3-8b --prefill-chunk-size 1024
4  40 read-llama-3-8b throughput read --random-weights llama-3-8b
4  70 calls-llama-2-7b calls steps --random-weights llama-2-7b QUANTIZED no
4  70 calls-llama-2-7b-int8 calls steps --random-weights llama-2-7b QUANTIZED int8
4  70 calls-llama-2-7b-int4 calls steps --random-weights llama-2-7b QUANTIZED int4
5  55 recall-copy recall SMOL --chunk-size 1024 --recompute-questions 12
5  45 recall-pinned recall --task pinned SMOL --text-file {wiki} --num-samples 8 --batch-size 8 --chunk-size 1024
5 105 sinks-wiki ppl WIKI SINKS
6 600 cpu-steps-70m latency --device cpu EAGER --rounds 24 ALL
6 900 cpu-run-70m ppl --device cpu --random-weights pythia-70m RUN --dtype float32 --num-samples 1 --max-tokens 4096 ALL
6 300 study-1000 ppl WIKI STUDY --device cpu --max-tokens 1000 --num-samples 3 --batch-size 3
6 800 study-2000 ppl WIKI STUDY --device cpu --max-tokens 2000 --num-samples 10 --batch-size 10
6 150 recall-questions recall --task questions SMOL --text-file {wiki} --num-samples 4 --text-tokens 4000 --device cpu
6  60 recall-streameval recall --task streameval SMOL LINES --device cpu
6 200 sinks-moby ppl SMOL --text-file {moby} --device cpu --arms sink line-breaks --capacities 1024 --n-sinks 0 1 2 4 8 BOOK
6  80 sizes-moby ppl SMOL --text-file {moby} --device cpu --arms sink --n-sinks 4 BOOK
6 150 calls-smollm2 calls steps SMOL LAPTOP no
6 200 calls-smollm2-int8 calls steps SMOL LAPTOP int8
6 900 study-5000 ppl WIKI STUDY --device cpu --max-tokens 5000 --num-samples 1
"""


def is_there(path: Path) -> bool:
    """Whether a result file is complete."""
    return path.exists() and not harness.read_json(path).get("interrupted")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the commands whose results are missing, each in a process of its own, to which all lengths are new."""
    parser = harness.Parser("all", __doc__, measures=False, output=None)
    parts = "1 to 5: on a GPU, under 9 minutes each, to results/h200; 6: on the CPU, to results/cpu (1 to 5)"
    parser.add_argument("--part", type=int, choices=range(1, 7), help=parts)
    parser.add_argument("--list", action="store_true", help="only show what is missing, and its estimated seconds")
    parser.add_argument("--smollm2", default="build/smollm2", help="folder of SmolLM2-135M-Instruct (%(default)s)")
    parser.add_argument("--wiki", default="build/wiki", help="WikiText-103's test split (%(default)s)")
    parser.add_argument("--moby", default="build/moby", help="Moby-Dick (%(default)s)")
    args = parser.parse_args(argv)
    args.output = args.output or ("results/cpu" if args.part == 6 else "results/h200")
    failed = []
    for part, seconds, name, *words in map(str.split, SET.strip().splitlines()):
        asked_for = int(part) == args.part if args.part else int(part) <= 5
        if not asked_for or is_there(Path(args.output) / f"{name}.json"):
            continue
        command = shlex.split(" ".join(SHORT.get(word, word) for word in words).format(**vars(args)))
        if "--device" not in command:
            command += ["--device", "cuda"]
        command += ["--output", args.output, "--name", name]
        print(f"part {part}, about {seconds} s: python -m benchmarks.{shlex.join(command)}", flush=True)
        if not args.list:
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]])
            failed += [name] if done.returncode else []
            print(f"{name} took {time.perf_counter() - start:.0f} s", flush=True)
    if failed:
        raise harness.BenchmarkError(f"{', '.join(failed)} failed: see above, and run this command again")


if __name__ == "__main__":
    sys.exit(harness.run(main))
