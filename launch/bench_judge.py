"""Measures a judge: latency and images per second, on any server of OpenAI's chat completions.

    python -m launch.bench_judge --endpoint=http://127.0.0.1:8000/v1 --requests=200 --concurrency=16 [--json=out.json]

Requests are those of training: two pictures, one token, log-probabilities. Several --endpoint share the load. It ends
early, with what it has measured, when --concurrency and four more requests in a row have failed.
"""

from pathlib import Path

from absl import flags

from cocoedit_jax.errors import UserError
from launch import command

_ENDPOINT = flags.DEFINE_multi_string("endpoint", ["http://127.0.0.1:8000/v1"], "Base address of a server; repeatable.")
_MODEL = flags.DEFINE_string("model", None, "Name of the model; default: the first that the server lists.")
_REQUESTS = flags.DEFINE_integer("requests", 200, "Requests in all.", lower_bound=1)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 16, "Requests at a time.", lower_bound=1, upper_bound=1024)
_SIZE = flags.DEFINE_integer("size", 512, "Side of the pictures in pixels.", lower_bound=8, upper_bound=8192)
_GROUP = flags.DEFINE_integer("group", 12, "Consecutive requests with the same source picture.", lower_bound=1)
_FORMAT = flags.DEFINE_enum("format", "png", ["png", "jpeg"], "Of the pictures.")
_TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds after which a request has failed.", lower_bound=0.1)
_KEY_ENV = flags.DEFINE_string("key_env", "", "Environment variable with the server's key.")
_KEY_FILE = flags.DEFINE_string("key_file", "", "File with the server's key.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the pictures.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers to this file.")


def main(argv: list[str]) -> None:
    from cocoedit_jax.reporting.telemetry import write_json
    from cocoedit_jax.rewards.chat import ChatClient
    from cocoedit_jax.rewards.judge_bench import WAIT_S, Load, describe, find_model, make_requests, run_load

    load = Load(_REQUESTS.value, _CONCURRENCY.value, _SIZE.value, _GROUP.value, _FORMAT.value, _SEED.value)
    with ChatClient(
        _ENDPOINT.value,
        _MODEL.value or "",
        concurrency=load.concurrency,
        timeout_s=_TIMEOUT.value,
        max_attempts=1,
        key_env=_KEY_ENV.value,
        key_file=_KEY_FILE.value,
    ) as client:
        client.model = client.model or find_model(client)
        result = run_load(client, load, make_requests(load), _TIMEOUT.value + WAIT_S)
    print(describe(result))
    if _JSON.value:
        write_json(Path(_JSON.value), result)
    if result["stopped"]:
        raise UserError(f"--endpoint: {result['stopped']}")


if __name__ == "__main__":
    command.run(main)
