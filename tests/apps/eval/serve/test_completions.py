"""POST /v1/completions against an engine whose tokens are known: what is answered, whole and as events."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from libs.model.inference import Sampling
from tests.apps.eval.serve.client import Answer, Connection, ask, complete
from tests.apps.eval.serve.serving import BYTES, Dictated, lorem, running, saying


def both(engine: Dictated, **fields: Any) -> tuple[Answer, Answer]:
    """The same request whole and streamed."""

    async def run() -> tuple[Answer, Answer]:
        async with running(engine) as server:
            whole = await complete(server.port, **fields)
            streamed = await complete(server.port, **fields, stream=True)
            return whole, streamed

    return asyncio.run(run())


def test_whole_and_streamed_say_what_the_engine_says() -> None:
    whole, streamed = both(Dictated(), prompt="void f", max_tokens=12, temperature=0, seed=3)
    prompt = BYTES.encode("void f").tolist()
    wanted = BYTES.decode(lorem(prompt, Sampling(max_new_tokens=12, seed=3))).decode()
    assert whole.status == streamed.status == 200
    assert whole.text == streamed.text == wanted
    body = whole.json
    assert body["object"] == "text_completion"
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert body["choices"][0]["finish_reason"] == "length"
    assert (body["model"], body["seed"], body["system_fingerprint"]) == ("toy", 3, "fp_0")
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert streamed.events[-1] == "[DONE]"
    parts = streamed.parts
    assert len(parts) == 12
    assert len({part["id"] for part in parts}) == 1
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None] * 11 + ["length"]


def test_the_request_reaches_the_sampler() -> None:
    engine = Dictated()
    both(engine, prompt="x", max_tokens=3, temperature=0.5, top_p=0.25, seed=11)
    asyncio.run(_defaults(engine))
    assert engine.seen[0] == engine.seen[1]
    eod = (BYTES.eod_id,)
    assert engine.seen[0] == Sampling(temperature=0.5, top_p=0.25, seed=11, max_new_tokens=3, stop_ids=eod)
    first, second = engine.seen[2:]
    assert (first.temperature, first.top_p, first.max_new_tokens) == (1.0, 1.0, 16)
    assert first.seed != second.seed, "a seed that is not given is drawn"


async def _defaults(engine: Dictated) -> None:
    async with running(engine) as server:
        for _ in range(2):
            answer = await complete(server.port, prompt="x", temperature=None, stop=None)
            assert answer.json["seed"] == engine.seen[-1].seed


def test_token_ids_as_a_prompt_and_the_end_of_the_document() -> None:
    whole, streamed = both(Dictated(saying("done")), prompt=[BYTES.special_ids["<|code|>"], 50], max_tokens=30)
    assert whole.text == streamed.text == "done"
    assert whole.json["choices"][0]["finish_reason"] == "stop"
    assert whole.json["usage"]["completion_tokens"] == 5, "the token that ends the document counts"
    assert whole.json["usage"]["prompt_tokens"] == 2


def test_a_stop_string_ends_the_request_and_is_in_no_event() -> None:
    engine = Dictated(saying("alpha STO STOP omega" * 5))
    whole, streamed = both(engine, prompt="x", max_tokens=90, stop=["STOP", "omega"], logprobs=0)
    assert whole.text == streamed.text == "alpha STO "
    seen = ""
    for part in streamed.parts:
        seen += part["choices"][0]["text"]
        assert "alpha STO ".startswith(seen)
    choice = whole.json["choices"][0]
    assert choice["finish_reason"] == streamed.parts[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == "alpha STO "
    assert whole.json["usage"]["completion_tokens"] == len("alpha STO STOP")
    assert len(engine.aborted) == 2, "the engine goes on generating for nobody"


def test_events_are_valid_text_though_tokens_are_bytes() -> None:
    said = "a€𝄞\u2028\n\r ä".encode() + b"\xff!"
    whole, streamed = both(Dictated(saying(said)), prompt="x", max_tokens=40)
    assert whole.text == streamed.text == said.decode(errors="replace")
    assert [part["choices"][0]["text"] for part in streamed.parts[:3]] == ["a", "€", "𝄞"]


def test_logprobs_are_the_engines_and_equal_in_both_forms() -> None:
    engine = Dictated(saying("aß"))
    whole, streamed = both(engine, prompt="x", max_tokens=9, temperature=0, logprobs=1)
    logprobs = whole.json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\x9f"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5 - 1 / 64, -0.5 - 2 / 64]
    assert logprobs["text_offset"] == [0, 1, 1]
    assert logprobs["top_logprobs"] == [{"a": -0.5}, {"bytes:\\xc3": -0.515625}, {"bytes:\\x9f": -0.53125}]
    for key in logprobs:
        assert [value for part in streamed.parts for value in part["choices"][0]["logprobs"][key] or []] == logprobs[
            key
        ]
    plain, _ = both(Dictated(saying("a")), prompt="x")
    assert plain.json["choices"][0]["logprobs"] is None


def test_usage_in_a_stream_when_asked_for() -> None:
    _, without = both(Dictated(saying("abc")), prompt="x")
    assert all("usage" not in part for part in without.parts)

    async def run() -> Answer:
        async with running(Dictated(saying("abc"))) as server:
            options = {"include_usage": True}
            return await complete(server.port, prompt="xyz", stream=True, stream_options=options)

    last = asyncio.run(run()).parts[-1]
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


REFUSED = {
    "unknown_field": ({"prompt": "x", "max_token": 3}, "max_tokens"),
    "unknown_option": ({"prompt": "x", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    "no_prompt": ({}, "'prompt' is missing"),
    "prompt_list": ({"prompt": ["a", "b"]}, "one prompt per request"),
    "prompt_bool": ({"prompt": [True]}, "token ids"),
    "prompt_empty": ({"prompt": ""}, "empty"),
    "prompt_ids": ({"prompt": [5, 4000]}, "4000"),
    "prompt_negative": ({"prompt": [-1]}, "-1"),
    "text_for_number": ({"prompt": "x", "max_tokens": "3"}, "max_tokens"),
    "bool_for_number": ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    "none_wanted": ({"prompt": "x", "max_tokens": 0}, "greater than or equal to 1"),
    "hot": ({"prompt": "x", "temperature": 2.5}, "2.5"),
    "nan": (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    "top_p": ({"prompt": "x", "top_p": 0}, "top_p"),
    "seed": ({"prompt": "x", "seed": 2**63}, "seed"),
    "cold": ({"prompt": "x", "temperature": 1e-309}, "temperature: allowed are 1e-06 to 2, and 0, which is greedy"),
    "stop_empty": ({"prompt": "x", "stop": ""}, "stop: a string of 0 characters; allowed are 1 to 256"),
    "stop_empty_in_list": ({"prompt": "x", "stop": ["a", ""]}, "stop: a string of 0 characters"),
    "stop_long": ({"prompt": "x", "stop": "a" * 257}, "stop: a string of 257 characters"),
    "stops": ({"prompt": "x", "stop": ["a"] * 5}, "stop: 5 strings; allowed are up to 4"),
    "stop_number": ({"prompt": "x", "stop": 3}, "stop: must be a string or a list of up to 4 strings"),
    "stop_numbers": ({"prompt": "x", "stop": ["a", 3]}, "stop: must be a string or a list of up to 4 strings"),
    "twice": (b'{"prompt": "x", "stop": "a", "stop": null}', "the field 'stop' is there more than once"),
    "twice_inside": (
        b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": true, "include_usage": false}}',
        "the field 'include_usage' is there more than once",
    ),
    "echo": ({"prompt": "x", "echo": True}, "fathom eval"),
    "n": ({"prompt": "x", "n": 2}, "one completion per request"),
    "best_of": ({"prompt": "x", "best_of": 3}, "best_of"),
    "suffix": ({"prompt": "x", "suffix": "}"}, "fill-in-the-middle"),
    "penalty": ({"prompt": "x", "presence_penalty": 0.5}, "penalties"),
    "bias": ({"prompt": "x", "logit_bias": {"5": 1.0}}, "logits"),
    "logprobs": ({"prompt": "x", "logprobs": 1}, "temperature=0"),
    "logprobs_many": ({"prompt": "x", "logprobs": 5, "temperature": 0}, "logprobs=5"),
    "options": ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream: true"),
    "too_long": ({"prompt": "x" * 250, "max_tokens": 10}, "needed 260, available 256"),
    "far_too_long": ({"prompt": "x" * 90_000}, "available 256"),
    "json": (b'{"prompt": "x"', "not valid JSON"),
    "json_utf8": (b'{"prompt": "\xff"}', "not valid JSON"),
    "json_surrogate": (b'{"prompt": "\\ud800"}', "not valid JSON"),
    "json_deep": (b"[" * 100_000, "not valid JSON"),
    "json_list": ([1], "must be a JSON object"),
    "no_body": (b"", "not valid JSON"),
}


def test_what_is_refused_says_why_in_openais_shape() -> None:
    async def run() -> dict[str, Answer]:
        async with running(Dictated(), max_header=1024) as server:
            found = {name: await ask(server.port, "/v1/completions", body) for name, (body, _) in REFUSED.items()}
            found["model"] = await complete(server.port, prompt="x", model="gpt-4")
            found["type"] = await ask(server.port, "/v1/completions", b"{}", headers={"Content-Type": "text/plain"})
            gzip = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            found["gzip"] = await ask(server.port, "/v1/completions", b"{}", headers=gzip)
            found["path"] = await ask(server.port, "/v1/chat/completions", {})
            found["method"] = await ask(server.port, "/v1/completions")
            found["head"] = await ask(server.port, "/health", headers={"X-Long": "y" * 1100})
            assert (await complete(server.port, prompt="x", max_tokens=2, model="toy")).status == 200
            assert (await server.rest())["jobs"]["accepted"] == 1
            return found

    statuses = {"model": 404, "type": 415, "gzip": 415, "path": 404, "method": 405}
    for name, answer in asyncio.run(run()).items():
        error = answer.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert error["type"] == "invalid_request_error"
        if name == "head":
            assert answer.status in (400, 431)
            continue
        assert answer.status == statuses.get(name, 400), (name, error)
        if name in REFUSED:
            assert REFUSED[name][1] in error["message"], name
            assert len(error["message"]) < 400, name


def test_neutral_values_of_what_is_not_offered_are_accepted() -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "frequency_penalty": 0, "presence_penalty": 0.0}
    whole, streamed = both(Dictated(saying("ok")), prompt="x", logit_bias={}, user="me", **neutral)
    assert whole.text == streamed.text == "ok"


def test_the_other_routes() -> None:
    async def run() -> None:
        engine = Dictated()
        async with running(engine) as server:
            models = (await ask(server.port, "/v1/models")).json
            assert [model["id"] for model in models["data"]] == ["toy"]
            assert models["data"][0]["max_model_len"] == 256
            assert (await ask(server.port, "/health")).json == {"status": "ok"}
            await complete(server.port, prompt="x")
            metrics = await server.rest()
            assert metrics["engine"]["counters"] == {"requests": 1}
            assert metrics["engine"]["blocks"] == {"free": 1000, "cached": 0, "active": 0, "dummy": 1}
            assert metrics["jobs"] == {"open": 0, "room": 12, "accepted": 1, "finished": 1}
            assert metrics["answers"]["200"] >= 3
        assert engine.closed
        assert len(engine.threads) == 1, "one thread alone touches the engine"

    asyncio.run(run())


def test_requests_are_computed_together_and_stay_apart() -> None:
    async def run() -> None:
        async with running(Dictated(step_seconds=0.001), queue=60) as server:
            prompts = [f"prompt {number}" for number in range(24)]
            fields = {"max_tokens": 20, "seed": 5}
            answers = await asyncio.gather(
                *(complete(server.port, prompt=p, stream=i % 2 == 0, **fields) for i, p in enumerate(prompts))
            )
            sampling = Sampling(temperature=1.0, seed=5, max_new_tokens=20)
            for prompt, answer in zip(prompts, answers, strict=True):
                wanted = lorem(BYTES.encode(prompt).tolist(), sampling)
                assert answer.text == BYTES.decode(wanted).decode()

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_several_requests_on_one_connection(stream: bool) -> None:
    async def run() -> None:
        async with running(Dictated(saying("ok"))) as server:
            connection = await Connection.open(server.port)
            for _ in range(3):
                body = b'{"prompt": "x", "stream": %s}' % (b"true" if stream else b"false")
                await connection.send("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                assert (await connection.answer()).text == "ok"
                connection.protocol.start_next_cycle()
            await connection.close()

    asyncio.run(run())
