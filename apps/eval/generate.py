"""`fathom generate`: a prompt from a file or stdin in, text out as it comes; or the memory plan alone.

Bytes in, bytes out: what is written is what the tokens stand for, whole characters or not. Not for many requests
(`fathom serve`) nor for scores (`fathom eval`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.eval.config import parse_tokens
from apps.eval.loading import choose_device, engine_facts, load_tokenizer
from libs.flags.canonical import sha256_hex
from libs.flags.environment import fathom_variables
from libs.flags.errors import ExitStatus, UserError, run_entry
from libs.flags.installed import install
from libs.flags.resolve import resolve
from libs.model import HybridLM
from libs.model.checkpoint import MANIFEST, resolve_checkpoint
from libs.model.inference import Engine, EngineConfig, LogitsNotFinite, MemoryPlan, Sampling
from libs.model.text.tokenizer import Tokenizer
from libs.model.weights import load_model, read_config

STDIN = "-"


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom generate`."""
    parser = argparse.ArgumentParser(prog="fathom generate", description="Text from a checkpoint, or its memory plan.")
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="RUN_OR_DIR", help="a run (its newest) or one"
    )
    parser.add_argument("--prompt", default=STDIN, metavar="FILE", help="default: -, stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="0 (default): of all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eod", action="store_true", help="go on after the end-of-document token")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--max-tokens", help="longest request, as 4096 or 4k (default: the prompt and what may follow)")
    memory.add_argument("--max-batch", type=int, default=1, help="requests that --plan makes room for (1)")
    memory.add_argument("--block-size", type=int, default=64, help="tokens of a KV block, 16 to 256 (64)")
    memory.add_argument("--draft-length", type=int, default=0, help="needs FATHOM_MTP_SPECULATION=on (0)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--plan", action="store_true", help="print the memory plan and generate nothing")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object at the end, with counts and log-probabilities"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Generate, or plan.

    Raises:
        UserError: no checkpoint, an empty or unreadable prompt, one longer than --max-tokens, or a value out of range.
        GateRefused: the environment asks for a gate that cannot be honoured.
    """
    args = build_parser().parse_args(argv)
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    asked = Sampling(**sampling)
    checkpoint, device = resolve_checkpoint(args.checkpoint), choose_device(args.device)
    tokenizer = load_tokenizer(checkpoint, read_config(checkpoint))
    max_tokens = None if args.max_tokens is None else parse_tokens(args.max_tokens)
    needless = args.plan and max_tokens is not None
    prompt = [] if needless else _read_prompt(args.prompt, tokenizer, ", or --max-tokens" if args.plan else "")
    config = EngineConfig(
        max_batch=args.max_batch,
        max_tokens=len(prompt) + asked.max_new_tokens if max_tokens is None else max_tokens,
        block_size=args.block_size,
        draft_length=args.draft_length,
    )
    install(resolve(fathom_variables(), engine_facts(device, read_config(checkpoint), config)))
    model = load_model(checkpoint, device=device)
    model.eval()
    if args.plan:
        _print_plan(model, config, args.json)
        return ExitStatus.OK
    stops = () if args.ignore_eod else (tokenizer.eod_id,)
    engine = Engine(model, config, weights=sha256_hex((checkpoint / MANIFEST).read_bytes()))
    try:
        _generate(engine, tokenizer, prompt, Sampling(**sampling, stop_ids=stops), as_json=args.json)
    except LogitsNotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.NONFINITE
    return ExitStatus.OK


def _read_prompt(name: str, tokenizer: Tokenizer, instead: str) -> list[int]:
    try:
        raw = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"--prompt {name} cannot be read: {error.strerror}") from error
    if not raw:
        where = "stdin" if name == STDIN else name
        raise UserError(f"the prompt is empty ({where}); give at least one byte{instead}")
    ids: list[int] = tokenizer.encode(raw).tolist()
    return ids


def _print_plan(model: HybridLM, config: EngineConfig, as_json: bool) -> None:
    plan: MemoryPlan = config.plan(model.config, model.head_weight.dtype)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if as_json:
        print(json.dumps({**plan._asdict(), "weights": weights, "config": config.model_dump(mode="json")}, indent=1))
        return
    print(f"{plan.requests} requests of up to {config.max_tokens} tokens, {plan.blocks} blocks of {config.block_size}")
    for name, size in {**plan.by_component, "total": plan.total, "weights (beside it)": weights}.items():
        print(f"  {name:<20} {size:>16,} bytes {size / 2**20:>10.1f} MiB")


def _generate(
    engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, *, as_json: bool
) -> None:
    if as_json:
        (found,) = engine.generate([prompt], sampling)
        shown: dict[str, Any] = {
            "prompt_tokens": found.prompt_tokens,
            "tokens": found.tokens,
            "text": tokenizer.decode_generated(found.tokens).decode("utf-8", errors="replace"),
            "logprobs": found.logprobs,
            "finish": found.finish,
            "prefix": found.report._asdict(),
            "counters": dict(engine.counters),
        }
        print(json.dumps(shown, indent=1))
        return
    engine.submit(prompt, sampling)
    while engine.busy:
        for event in engine.step():
            sys.stdout.buffer.write(tokenizer.decode_generated([event.token]))
            sys.stdout.buffer.flush()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
