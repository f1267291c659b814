"""The engine: the one public door to generation and scoring. Requests in, tokens and log-probabilities out.

A request's numbers are the same bits whatever else runs, in any order and batch, with or without the prefix cache and
speculation (README.md, "Exactness"). Not for text: prompts and results are token ids.
"""
# S tokens  D hidden  V vocabulary

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from libs.flags.errors import UserError
from libs.flags.installed import is_enabled, value_of
from libs.kernels.backend import Choice
from libs.model.hybrid import HybridLM
from libs.model.inference.audit import Auditor, compare, recompute
from libs.model.inference.block_pool import BlockUsage
from libs.model.inference.drafts import Drafter
from libs.model.inference.engine_config import EngineConfig
from libs.model.inference.kv_blocks import PagedKV
from libs.model.inference.lanes import PagedLane
from libs.model.inference.layout import kv_layout, model_fingerprint, state_layout, weights_digest
from libs.model.inference.marks import Marks, identity_of
from libs.model.inference.plan import MemoryPlan
from libs.model.inference.prefix import MissReason, PrefixCache, PrefixMode, PrefixReport
from libs.model.inference.request import Request, token_ids, verified
from libs.model.inference.resources import CapacityError, EngineStopped, NotCopyable
from libs.model.inference.results import NO_COUNTS, Completion, FinishReason, Generated, Scored
from libs.model.inference.row_tile import choose_row_tile
from libs.model.inference.runner import Runner, Step, grid_tokens, pieces
from libs.model.inference.sampler import Sampled, Sampling, logprobs_of, sample
from libs.model.inference.scheduler import Scheduler
from libs.model.inference.state_slots import StateSlots

__all__ = ["Completion", "Engine", "EngineConfig", "FinishReason", "Generated", "Sampling", "Scored"]


class Engine(NotCopyable):
    """Drives one model's slots, blocks, prefix cache and scheduler.

    After an error in a step, all that computes or saves raises EngineStopped until `close`.

    Attributes:
        config, grid: what it was built with; the tokens that prefill works in.
        choices: the row tile of decode and why, beside the model's own backend choices.
    """

    def __init__(self, model: HybridLM, config: EngineConfig, *, weights: str | None = None) -> None:
        """Reads the gates `prefix_cache` and `mtp_speculation` once, and allocates what `plan` says.

        Args:
            weights: digest of the committed checkpoint; None: computed over all parameters.

        Raises:
            UserError: a prefill chunk off the grid, drafts without the gate or without MTP depths, a sharded model.
            GatesNotInstalled: the program has not installed its gates.
        """
        if model.parallel is not None and (model.parallel.tp.size > 1 or model.parallel.cp.size > 1):
            raise UserError("the engine runs a model on one device; load it with tp=1 and cp=1")
        self.model, self.config, self.grid = model, config, grid_tokens(model.config)
        self.mode = PrefixMode(str(value_of("prefix_cache")))
        config.check_model(model.config, grid=self.grid, speculation=is_enabled("mtp_speculation"))
        dtype, device = model.head_weight.dtype, model.head_weight.device
        self._plan = config.plan(model.config, dtype)
        self.fingerprint = model_fingerprint(model.config, weights_digest(model) if weights is None else weights)
        self._slots = StateSlots(
            state_layout(model.config, dtype), model=self.fingerprint, max_batch=config.max_batch,
            max_draft=config.intermediate, device=device,
        )  # fmt: skip
        self._kv = PagedKV(
            kv_layout(model.config, dtype, config.block_size), model=self.fingerprint, blocks=self._plan.blocks,
            device=device, share=self.mode is not PrefixMode.OFF,
        )  # fmt: skip
        self._cache = PrefixCache(
            self._kv, self._slots, self.mode, grid=self.grid, max_snapshot_bytes=config.snapshot_bytes
        )
        tile = choose_row_tile(model)
        self.choices: dict[str, Choice] = {**model.choices, "row_tile": tile}
        self._runner = Runner(model, int(tile.value), self._slots if config.intermediate else None)
        self._drafter = Drafter(model, config.max_batch) if config.draft_length else None
        self._marks = Marks(
            self._cache, self._kv, self._slots, identity=identity_of(model, self.fingerprint, tile), grid=self.grid
        )
        self._scheduler, self._auditor = Scheduler(config.max_batch), Auditor(config.audit_share)
        self._requests: dict[int, Request] = {}
        self._results: dict[int, Completion | Scored | None] = {}
        self._undelivered: list[Generated] = []
        self._next, self._counts, self._stopped = 0, Counter[str](), ""

    def _take_number(self) -> int:
        self._next += 1
        return self._next - 1

    def _refuse_if_stopped(self) -> None:
        if self._stopped:
            raise EngineStopped(f"the engine stopped, and needs close() before it goes on: {self._stopped}")

    @property
    def plan(self) -> MemoryPlan:
        """Bytes of all that the engine allocated for good."""
        return self._plan

    @property
    def busy(self) -> bool:
        """Whether a `step` has something to do."""
        return self._scheduler.busy or bool(self._undelivered)

    @property
    def waiting(self) -> int:
        """Requests that were submitted and not yet begun."""
        return len(self._scheduler.waiting)

    @property
    def usage(self) -> BlockUsage:
        return self._kv.usage

    @property
    def counters(self) -> Mapping[str, int]:
        """Sums since the start: those of the prefix cache (marks among its requests), generated_tokens, drafted,
        accepted, audited, steps, peak_blocks (at once, without the dummy), block_steps (summed over steps)."""
        return {**NO_COUNTS, **self._cache.counters, **self._counts, "audited": self._auditor.audited}

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Queue a request; its number. Never waits.

        Raises:
            UserError: an empty prompt, a token that is none, or a request that can never fit (needed and available).
        """
        self._refuse_if_stopped()
        return self._queue(Request.to_generate(prompt, sampling, **self._limits))

    def step(self) -> list[Generated]:
        """Admit, then one chunk of one prompt or one round of decoding for all that have theirs; [] when idle.

        Raises:
            AuditFailed: a hit is not what it is without the cache. LogitsNotFinite: there is no answer in them.
            EngineStopped: an earlier step ended in an error; `close` releases all and starts anew.
        """
        self._refuse_if_stopped()
        try:
            return self._step()
        except BaseException as error:
            self._stopped = repr(error)
            raise

    def _step(self) -> list[Generated]:
        events, self._undelivered = self._undelivered, []
        self._scheduler.admit(self._enter)
        active = self._kv.usage.active
        self._counts["peak_blocks"] = max(self._counts["peak_blocks"], active)
        request = self._scheduler.next_prefill()
        if request is not None or self._scheduler.decoding:
            self._counts.update(steps=1, block_steps=active)
        if request is not None:
            return events + self._prefill(request)
        return events + (self._decode(self._scheduler.decoding) if self._scheduler.decoding else [])

    def abort(self, request: int) -> None:
        """End a request in any phase and release all it has; nothing when it is over already.

        Raises:
            ValueError: a number that `submit` never gave.
        """
        if not 0 <= request < self._next:
            raise ValueError(f"request {request} was never submitted")
        if request in self._requests:
            self._finish(self._requests[request], FinishReason.ABORTED)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Run to the end; results in order of the prompts. Tokens of requests submitted before are kept for `step`.

        Raises:
            UserError: as `submit`; then none of these requests was queued.
        """
        self._refuse_if_stopped()
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts and {len(each)} samplings: give one, or one for each")
        pairs = zip(prompts, each, strict=True)
        found = self._run([Request.to_generate(prompt, how, **self._limits) for prompt, how in pairs])
        return [result for result in found if isinstance(result, Completion)]

    def score(self, items: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Log-probabilities of continuations, each after its context; results in order of the items.

        Contexts that several items share are computed once where the prefix cache keeps states.

        Raises:
            UserError: an empty context or continuation, a token that is none, or an item that can never fit.
        """
        self._refuse_if_stopped()
        found = self._run([Request.to_score(context, after, **self._limits) for context, after in items])
        return [result for result in found if isinstance(result, Scored)]

    def checkpoint(self, name: str, prompt: Sequence[int]) -> None:
        """Mark a known prefix: compute it now, rounded down to a boundary, and keep it longer than what is cached.

        Raises:
            UserError, CapacityError: see `Marks.add`.
        """
        self._refuse_if_stopped()
        tokens, number = token_ids(prompt, "prefix", self.model.config.vocab_size), self._take_number()

        def compute(slot: int, start: int, end: int) -> None:
            lane = PagedLane(self._kv, self._slots, number, slot)
            for first, stop in pieces(start, end, self.grid):
                self._runner.prefill(lane, tokens[first:stop], first)
                self._cache.completed(number, tokens[first:stop])

        self._marks.add(name, tokens, number, compute)

    def save_marks(self, directory: Path) -> None:
        """Write every mark as a file with fingerprint and checksum. Raises UserError: see `Marks.save`."""
        self._refuse_if_stopped()
        self._marks.save(directory)

    def load_marks(self, directory: Path) -> tuple[str, ...]:
        """Take over the marks of a directory; their names. Raises UserError, CapacityError: see `Marks.load`."""
        self._refuse_if_stopped()
        return self._marks.load(directory, self._take_number)

    def close(self) -> None:
        """Abort everything and forget all prefixes and marks; the engine can be used again."""
        for number in list(self._requests):
            self.abort(number)
        self._undelivered.clear()
        self._cache.clear()
        self._marks.forget()
        self._stopped = ""

    def check(self) -> None:
        """All invariants of slots, blocks and cache, in O(pool). Raises AssertionError."""
        self._cache.check()

    @property
    def _limits(self) -> dict[str, int]:
        return {"vocab": self.model.config.vocab_size, "max_tokens": self.config.max_tokens}

    def _refuse_too_large(self, request: Request) -> None:
        needed = self._kv.layout.blocks_for(request.needed_tokens)
        available = self._kv.blocks - 1
        if needed > available:
            raise UserError(
                f"a request of {request.needed_tokens} tokens needs {needed} KV blocks, available are {available}; "
                "shorten it or give the engine more kv_blocks"
            )

    def _queue(self, request: Request) -> int:
        self._refuse_too_large(request)
        request.number = self._take_number()
        self._requests[request.number] = request
        self._scheduler.waiting.append(request)
        return request.number

    def _run(self, requests: Sequence[Request]) -> list[Completion | Scored | None]:
        """Queue all or none, and step until they are over; what others give meanwhile is for the caller's `step`."""
        for request in requests:
            self._refuse_too_large(request)
        numbers, others = [self._queue(request) for request in requests], list[Generated]()
        wanted = set(numbers)
        self._results.update(dict.fromkeys(numbers))
        try:
            for number in numbers:
                while self._results[number] is None:
                    others.extend(event for event in self.step() if event.request not in wanted)
        finally:
            found = [self._results.pop(number) for number in numbers]
            self._undelivered = others + self._undelivered
        return found

    def _enter(self, request: Request) -> None:
        """Take all the memory that the request can come to need. Raises CapacityError."""
        # Only whole pieces of the grid have the same bits in every request that begins with them.
        common = len(request.prompt) // self.grid * self.grid
        upto, context = request.needed_tokens, request.context
        while True:
            try:
                admitted = self._cache.admit(request.number, request.prompt, upto=upto, context=context, common=common)
                break
            except CapacityError:
                # Marks give way only when nothing that runs will.
                if self._scheduler.decoding or not self._marks.drop_oldest():
                    raise
        request.lane = PagedLane(self._kv, self._slots, request.number, admitted.slot)
        request.skipped = admitted.start
        if self._drafter is not None:
            self._drafter.clear(request.row)

    def _prefill(self, request: Request) -> list[Generated]:
        """One chunk of a prompt, in pieces of the grid; with the last, the first output."""
        lane, prompt = request.lane, request.prompt
        assert lane is not None, "admitted"
        done = self._kv.length(request.number)
        end = min(done + self.config.prefill_chunk, len(prompt))
        for start, stop in pieces(done, end, self.grid):
            hidden_SD = self._runner.prefill(lane, prompt[start:stop], start)
            self._cache.completed(request.number, prompt[start:stop])
            if request.continuation and stop >= request.context:
                self._score_piece(request, hidden_SD, start, stop)
        if end < len(prompt):
            return []
        self._audit(request, hidden_SD)
        if request.sampling is None:
            self._finish(request, FinishReason.LENGTH)
            return []
        self._scheduler.prefilled(request)
        if self._drafter is not None:
            self._drafter.extend(request.row, hidden_SD)
        logits_V = self._runner.logits(hidden_SD[-1:])[0]
        return self._emit(request, [sample(logits_V, request.sampling, 0, request.title)])

    def _score_piece(self, request: Request, hidden_SD: Tensor, start: int, stop: int) -> None:
        first = max(request.context - 1, start)
        place = first + 1 - request.context
        targets = list(request.continuation[place : stop + 1 - request.context])
        logprobs, greedy = logprobs_of(self._runner.logits(hidden_SD[first - start :]), targets, place, request.title)
        request.logprobs.extend(logprobs)
        request.greedy = request.greedy and all(greedy)

    def _decode(self, requests: Sequence[Request]) -> list[Generated]:
        """One round: the last output of every request, and drafts after it; all outputs that follow."""
        batch = list(requests)
        steps = []
        for request in batch:
            assert request.lane is not None, "admitted"
            tokens = (request.generated[-1], *self._drafts(request))
            steps.append(Step(request.lane, tokens, self._kv.length(request.number)))
        decoded = self._runner.decode(steps)
        outputs, row = list[list[Sampled]](), 0
        for request, step in zip(batch, steps, strict=True):
            outputs.append(verified(request, step.tokens, decoded.logits[row : row + len(step.tokens)]))
            row += len(step.tokens)
        decoded.pending.commit([len(found) for found in outputs])
        events, row = list[Generated](), 0
        for request, step, found in zip(batch, steps, outputs, strict=True):
            self._cache.completed(request.number, step.tokens[: len(found)])
            if self._drafter is not None:
                self._drafter.extend(request.row, decoded.hidden[row : row + len(found)])
            self._counts.update(drafted=len(step.tokens) - 1, accepted=len(found) - 1)
            events.extend(self._emit(request, found))
            row += len(step.tokens)
        return events

    def _drafts(self, request: Request) -> list[int]:
        """Never more than the request may still generate after the output that is certain."""
        if self._drafter is None or request.sampling is None:
            return []
        left = request.sampling.max_new_tokens - len(request.generated) - 1
        length = min(self.config.draft_length, left)
        return self._drafter.propose(request.row, (*request.prompt, *request.generated), length) if length > 0 else []

    def _emit(self, request: Request, found: Sequence[Sampled]) -> list[Generated]:
        sampling, events = request.sampling, list[Generated]()
        assert sampling is not None, "a request that generates"
        finish = None
        for token, logprob in found:
            assert finish is None, "nothing is generated after the end"
            request.generated.append(token)
            request.logprobs.append(logprob)
            if token in sampling.stop_ids:
                finish = FinishReason.STOP
            elif len(request.generated) == sampling.max_new_tokens:
                finish = FinishReason.LENGTH
            events.append(Generated(request.number, token, logprob, finish))
        self._counts["generated_tokens"] += len(found)
        if finish is not None:
            self._finish(request, finish)
        return events

    def _finish(self, request: Request, finish: FinishReason) -> None:
        self._scheduler.remove(request)
        del self._requests[request.number]
        report = PrefixReport(0, 0, 0, MissReason.OFF if self.mode is PrefixMode.OFF else None)
        if request.lane is not None:
            report = self._cache.release(request.number)
            request.lane = None
        if request.number in self._results:
            logprobs = tuple(request.logprobs)
            self._results[request.number] = (
                Scored(logprobs, request.greedy, report)
                if request.sampling is None
                else Completion(len(request.prompt), tuple(request.generated), logprobs, finish, report)
            )

    def _audit(self, request: Request, hidden_SD: Tensor) -> None:
        """Of a hit, perhaps: the same prompt again without the cache. Stops the engine when a bit differs."""
        assert request.lane is not None, "admitted"
        if not self._cache.is_hit(request.number) or not self._auditor.chooses():
            return
        plain, wanted_SD = recompute(self._runner, request.prompt, self.grid)
        n = len(request.prompt)
        states = {layer: request.lane.state(layer) for layer in self._slots.layout.layers}
        kv = {layer: self._kv.view(layer, request.number, n) for layer in self._kv.layout.layers}
        compare(self._runner, request.number, plain, states=states, kv=kv, hidden=(hidden_SD, wanted_SD))
