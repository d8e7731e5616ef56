"""Micro-batching, without a server."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from torch_bridge.judge_server.batching import Batcher, BatchLimits, QueueFull
from torch_bridge.judge_server.chat_model import Completion, Prompt, Sampling


class Model:
    """Answers with the prompt's text; remembers batches; fails where it finds "bad" or more than `most` prompts. It
    stands still while `go` is not set.
    """

    def __init__(self, most=100):
        self.batches, self.most, self.go = [], most, threading.Event()
        self.go.set()

    def __call__(self, prompts, samplings):
        self.go.wait()
        texts = [prompt.inputs for prompt in prompts]
        self.batches.append(texts)
        if len(texts) > self.most:
            raise MemoryError("too many")
        if "bad" in texts:
            raise ValueError("cannot be computed")
        return [Completion((), text, "stop") for text in texts]


def submit_all(model, limits, work):
    """Results or exceptions of (text, prompt tokens, new tokens), submitted at once."""

    async def main():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(model, limits, thread)
            running = asyncio.create_task(batcher.run())
            tasks = [batcher.submit(Prompt(text, tokens), Sampling(new)) for text, tokens, new in work]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            running.cancel()
            assert batcher.depth == 0 and batcher.batch_seconds == 0
            return [item.text if isinstance(item, Completion) else item for item in found], batcher

    return asyncio.run(main())


def test_requests_at_one_time_are_one_batch_of_bounded_size():
    model = Model()
    work = [(str(number), 1, 1) for number in range(10)]
    found, _ = submit_all(model, BatchLimits(size=4, wait_seconds=0.05), work)
    assert found == [text for text, *_ in work]
    assert [len(batch) for batch in model.batches] == [4, 4, 2] and sum(model.batches, []) == found


def test_kinds_are_not_mixed_and_memory_is_bounded():
    model = Model()
    work = [("a", 9, 1), ("long", 9, 50), ("b", 9, 1), ("longer", 9, 60), ("c", 9, 1)]
    found, _ = submit_all(model, BatchLimits(size=8, wait_seconds=0.02), work)
    assert model.batches == [["a", "b", "c"], ["long", "longer"]] and found == [text for text, *_ in work]
    # Padding counts: 3 x 10 tokens fit into 39, 4 x 10 do not; a prompt that alone is too long is still computed.
    model = Model()
    submit_all(model, BatchLimits(size=8, wait_seconds=0.02, tokens=39), [(str(n), 9, 1) for n in range(4)])
    assert [len(batch) for batch in model.batches] == [3, 1]
    model = Model()
    submit_all(model, BatchLimits(size=8, wait_seconds=0.02, tokens=39), [("x", 99, 1), ("y", 1, 1)])
    assert model.batches == [["x"], ["y"]]


def test_a_batch_that_fails_is_computed_in_halves():
    model = Model()
    found, batcher = submit_all(model, BatchLimits(wait_seconds=0.02), [(t, 1, 1) for t in ("a", "b", "bad", "c")])
    assert found[:2] == ["a", "b"] and found[3] == "c" and isinstance(found[2], ValueError)
    assert model.batches == [["a", "b", "bad", "c"], ["a", "b"], ["bad", "c"], ["bad"], ["c"]]
    assert not batcher.ill
    model = Model(most=2)
    found, _ = submit_all(model, BatchLimits(wait_seconds=0.02), [(str(n), 1, 1) for n in range(5)])
    assert found == ["0", "1", "2", "3", "4"]
    _, batcher = submit_all(Model(), BatchLimits(size=1), [("bad", 1, 1)] * 3)
    assert batcher.ill


def test_a_model_that_answers_for_another_number_fails():
    found, _ = submit_all(lambda prompts, samplings: [], BatchLimits(), [("a", 1, 1)])
    assert isinstance(found[0], RuntimeError) and "0 completions for 1 prompts" in str(found[0])


def test_places_are_bounded_and_given_back():
    async def main():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(Model(), BatchLimits(queue=2), thread)
            with batcher.place(), batcher.place():
                with pytest.raises(QueueFull) as caught, batcher.place():
                    pass
                assert 1 <= caught.value.retry_after <= 30
            with batcher.place():
                pass

    asyncio.run(main())


def test_a_cancelled_request_is_not_computed():
    model = Model()
    model.go.clear()

    async def main():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(model, BatchLimits(size=1), thread)
            running = asyncio.create_task(batcher.run())
            try:
                first, second, third = (
                    asyncio.create_task(batcher.submit(Prompt(text, 1), Sampling())) for text in ("a", "b", "c")
                )
                async with asyncio.timeout(60):
                    while not batcher.batch_seconds:
                        await asyncio.sleep(0.005)
                assert batcher.depth == 2
                second.cancel()
                await asyncio.gather(second, return_exceptions=True)
                assert batcher.depth == 1
            finally:
                model.go.set()
            await asyncio.gather(first, third)
            running.cancel()

    asyncio.run(main())
    assert model.batches == [["a"], ["c"]]
